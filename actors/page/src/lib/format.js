// Numbers and states for people.

export const number = (value, digits = 0) =>
  value == null || !Number.isFinite(value)
    ? "–"
    : value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });

/** Three digits that count. */
export function short(value) {
  if (value == null || !Number.isFinite(value)) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e4) return number(value);
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (Math.abs(value) >= size) {
      const scaled = value / (unit === "k" ? 1e3 : size);
      return `${scaled.toFixed(scaled < 10 ? 2 : scaled < 100 ? 1 : 0)} ${unit}`;
    }
  }
  const size = Math.abs(value);
  return number(value, size >= 100 ? 0 : size >= 10 ? 1 : 2);
}

export const ms = (value) => (value == null ? "–" : value >= 1e4 ? `${short(value / 1e3)} s` : `${short(value)} ms`);

export function bytes(value) {
  if (value == null) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit ? value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0) : value} ${units[unit]}`;
}

export function ago(seconds) {
  if (seconds == null) return "–";
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86_400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86_400)} d ${Math.floor((s % 86_400) / 3600)} h`;
}

export const clock = (at_ms) => (at_ms ? new Date(at_ms).toLocaleTimeString("en-GB") : "–");

/** The word of a state that is a word, or an object with one. */
export const word = (state) => (typeof state === "string" ? state : (state?.state ?? "–"));

/** What more it says. */
export const detail = (state) =>
  typeof state === "object" && state
    ? (state.reason ?? state.why ?? (state.cause && cause(state.cause)) ?? progress(state) ?? "")
    : "";

function progress(state) {
  if (state.in_ms != null) return `attempt ${state.attempt}, in ${ms(state.in_ms)}`;
  return state.progress ? Object.values(state.progress).filter((v) => v != null).join(" ") : undefined;
}

/** Why something died, in a line. */
export function cause(death) {
  if (death == null) return "–";
  if (typeof death === "string") return death;
  const [kind, parts] = death.kind ? [death.kind, death] : (Object.entries(death)[0] ?? ["", {}]);
  const said = Object.entries(parts ?? {}).filter(([key, value]) => key !== "kind" && value != null && typeof value !== "object");
  return [kind.replaceAll("_", " "), ...said.map(([key, value]) => `${key} ${value}`)].join(", ");
}

const GOOD = ["ready", "created", "SUCCEEDED", "committed", "complete", "RUNNING"];
const BUSY = ["starting", "restarting", "pending", "prepared", "rescheduling", "draining", "leaving", "stopping", "ordered", "PENDING"];
const IDLE = ["drained", "STOPPED", "absent"];

/** Its colour. */
export function tone(state) {
  const text = word(state);
  if (GOOD.includes(text)) return "good";
  if (BUSY.includes(text)) return "busy";
  return IDLE.includes(text) ? "idle" : "bad";
}
