// Runs the network, the decoding and the matching beside the page, so that the page stays quick.

import { decode } from "./decode.js";
import { agreeing } from "./homography.js";
import { place, toGray, toInput, toPicture } from "./image.js";
import { mutualNearest } from "./match.js";
import { openMatcher } from "./matcher.js";
import { openNetwork } from "./network.js";

let network = null;
let model = null;
let matcher = null; // null: mutual nearest neighbors
const seen = {}; // "a", "b" -> placement, outputs of the network, milliseconds; kept so that sliders need no new run

async function open(message) {
  model = message.model;
  network = await openNetwork(model, message.wish);
  matcher = model.matcher && (await openMatcher(network.ort, model.matcher));
  return { backend: network.backend, note: network.note };
}

async function update({ images, options }) {
  for (const [slot, image] of Object.entries(images)) {
    if (image === null) delete seen[slot];
    else seen[slot] = await run(image, options);
  }
  const features = {};
  let decodeMs = 0;
  for (const [slot, { placement, outputs }] of Object.entries(seen)) {
    const start = performance.now();
    features[slot] = decode(outputs, placement, options, model);
    toPicture(features[slot].xy, placement);
    decodeMs = performance.now() - start;
  }
  const start = performance.now();
  const match = features.a && features.b ? await matchBoth(features) : null;
  const ms = { network: (seen.b ?? seen.a)?.ms, decode: decodeMs, match: match && performance.now() - start };
  return { features, match, ms };
}

async function run({ rgba, width, height }, { maxSidePx }) {
  const placement = place(width, height, maxSidePx);
  const input = toInput(toGray(new Uint8ClampedArray(rgba), width * height), placement);
  const start = performance.now();
  const outputs = await network.infer(input, placement.inputWidth, placement.inputHeight);
  return { placement, outputs, ms: performance.now() - start };
}

async function matchBoth({ a, b }) {
  const { rows, distances } = matcher ? await matcher(a, b, seen.a.placement, seen.b.placement) : mutualNearest(a, b);
  return { rows, distances, agree: agreeing(a.xy, b.xy, rows) };
}

const kinds = { open, update };

self.onmessage = async ({ data }) => {
  try {
    self.postMessage({ id: data.id, result: await kinds[data.kind](data) });
  } catch (error) {
    self.postMessage({ id: data.id, error: String(error?.message ?? error) });
  }
};
