// Orders: asked for once more before they are given, with the cluster's token where it wants one.
import { post, secret } from "./api.js";

export const asking = $state({ order: null, error: "", busy: false, wantsToken: false, token: "", done: "" });

/** Asks whether `path` should be ordered. */
export function order(title, text, path, done) {
  Object.assign(asking, { order: { title, text, path, done }, error: "", busy: false, token: secret.get("token") });
}

export async function give() {
  asking.busy = true;
  if (asking.token) secret.set("token", asking.token);
  try {
    const answer = await post(asking.order.path);
    asking.done = asking.order.done(answer);
    asking.order = null;
    asking.wantsToken = false;
    setTimeout(() => (asking.done = ""), 6000);
  } catch (why) {
    asking.wantsToken ||= why.status === 403;
    asking.error = why.message;
  }
  asking.busy = false;
}
