// Talks to the dashboard. The API key and the cluster token live in this tab only and end with it.

export class Refused extends Error {
  constructor(status, text) {
    super(text || `HTTP ${status}`);
    this.status = status;
  }
}

export const secret = {
  get: (name) => sessionStorage.getItem(name) ?? "",
  set: (name, value) => sessionStorage.setItem(name, value.trim()),
};

function headers() {
  const all = {};
  if (secret.get("key")) all.authorization = `Bearer ${secret.get("key")}`;
  if (secret.get("token")) all["x-heliostat-token"] = secret.get("token");
  return all;
}

async function answer(path, options) {
  const response = await fetch(path, { cache: "no-store", ...options, headers: headers() });
  if (!response.ok) throw new Refused(response.status, await response.text());
  return response;
}

export const get = async (path, signal) => (await answer(path, { signal })).json();
export const post = async (path) => (await answer(path, { method: "POST" })).json();
export const stream = (path, signal) => answer(path, { signal });

/** Calls `load` now and `every` ms after each end, while the tab is seen, until the returned function is called. */
export function poll(load, every = 1000) {
  const stop = new AbortController();
  let timer;
  async function tick() {
    if (!document.hidden) {
      try {
        await load(stop.signal);
      } catch (why) {
        if (stop.signal.aborted) return;
        console.debug(why);
      }
    }
    if (!stop.signal.aborted) timer = setTimeout(tick, every);
  }
  tick();
  return () => {
    stop.abort();
    clearTimeout(timer);
  };
}
