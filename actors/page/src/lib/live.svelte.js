// What every view shows, asked for once a second. Histories are filled up, not fetched anew.
import { get, poll } from "./api.js";

const SAMPLES_MAX = 600;

export const live = $state({ error: "", wantsKey: false, stale: false });
/** Replaced as a whole: none of it is changed in place. */
export const data = new (class {
  status = $state.raw(null);
  serving = $state.raw([]);
  balances = $state.raw([]);
})();

/** The newer answer with the samples that came before it. */
function grown(before, now, key) {
  return now.map((next) => {
    const old = before.find((entry) => entry[key] === next[key]);
    const samples = old ? [...old.samples, ...next.samples].slice(-SAMPLES_MAX) : next.samples;
    return { ...next, samples };
  });
}

const newest = (entries) => Math.min(...entries.map((entry) => entry.samples.at(-1)?.at_ms ?? 0), Infinity);
const since = (entries) => (Number.isFinite(newest(entries)) ? newest(entries) : 0);

async function look(signal) {
  try {
    const [status, serving, balances] = await Promise.all([
      get("/api/status", signal),
      get(`/api/serving?since_ms=${since(data.serving)}`, signal),
      get(`/api/eplb?since_ms=${since(data.balances)}`, signal),
    ]);
    // Entries whose newest samples differ would get some twice.
    const fresh = (before, now, key) =>
      now.map((entry) => {
        const last = before.find((b) => b[key] === entry[key])?.samples.at(-1)?.at_ms ?? 0;
        return { ...entry, samples: entry.samples.filter((sample) => sample.at_ms > last) };
      });
    data.status = status;
    data.serving = grown(data.serving, fresh(data.serving, serving, "id"), "id");
    data.balances = grown(data.balances, fresh(data.balances, balances, "eplb"), "eplb");
    live.error = "";
    live.wantsKey = false;
  } catch (why) {
    if (signal.aborted) return;
    live.wantsKey = why.status === 401;
    live.error = why.status ? why.message : "The dashboard does not answer.";
  }
}

export const watch = () => poll(look);
