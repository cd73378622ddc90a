// The supervision tree as rows with depths: supervisors with what sits below them, then actors that the head restarts by
// itself.

function rule(strategy, restart) {
  const name = typeof strategy === "string" ? strategy : Object.keys(strategy)[0];
  const judge = typeof strategy === "object" && Object.values(strategy)[0]?.actor;
  return `${name.replaceAll("_", "-")}${judge ? ` ${judge}` : ""}, at most ${restart.max_restarts} restarts in ${restart.window?.secs ?? restart.window ?? "?"} s`;
}

export function tree(status) {
  const below = new Map();
  const known = new Set(status.supervisors.map((supervisor) => supervisor.name));
  const put = (seat, row) => {
    const parent = seat && known.has(seat.supervisor) ? seat.supervisor : "";
    if (!below.has(parent)) below.set(parent, []);
    below.get(parent).push({ ...row, order: seat?.order ?? 0 });
  };
  for (const s of status.supervisors) put(s.seat, { name: s.name, supervisor: { rule: rule(s.strategy, s.restart) } });
  for (const actor of status.actors) put(actor.seat, { name: actor.name, actor });
  const rows = [];
  const walk = (parent, depth) => {
    const children = below.get(parent) ?? [];
    // Supervisors first at the top; within one, by seat.
    children.sort((a, b) => !!b.supervisor - !!a.supervisor || a.order - b.order || a.name.localeCompare(b.name, "en", { numeric: true }));
    for (const child of children) {
      rows.push({ ...child, depth });
      if (child.supervisor && depth < 32) walk(child.name, depth + 1);
    }
  };
  walk("", 0);
  return rows;
}
