// Colours of loads: the mean is the colour of the ground, less is colder, more is hotter, twice the mean is hottest.

const parse = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const hex = (rgb) => `#${rgb.map((v) => Math.round(v).toString(16).padStart(2, "0")).join("")}`;
const bright = ([r, g, b]) => 0.299 * r + 0.587 * g + 0.114 * b;

/** From `cold,mid,hot` to a function: value relative to the mean -> colour, and that of text on it. */
export function heat(stops) {
  const all = stops.split(",").map((stop) => parse(stop.trim()));
  const steps = 64;
  const table = Array.from({ length: steps + 1 }, (_, i) => {
    const at = (i / steps) * (all.length - 1);
    const [low, part] = [Math.min(Math.floor(at), all.length - 2), at - Math.min(Math.floor(at), all.length - 2)];
    const rgb = all[low].map((v, j) => v + (all[low + 1][j] - v) * part);
    return { fill: hex(rgb), ink: bright(rgb) > 140 ? "#10151c" : "#eef2f7" };
  });
  return (relative) => table[Math.max(0, Math.min(steps, Math.round((Number.isFinite(relative) ? relative : 0) * 0.5 * steps)))];
}
