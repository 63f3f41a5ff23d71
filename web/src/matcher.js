// Matches two sets of keypoints by a trained network, as src/superpoint_trt/match/learned.py does. Tests hold both equal.

import { download } from "./network.js";

/**
 * @param ort onnxruntime-web, as network.js has set it up. The matcher runs on the processor.
 * @param {{name: string, url: string, minScore: number}} matcher an .onnx of superpoint matcher export.
 * @returns {Promise<Function>} (first, second, firstSize, secondSize) -> {rows, distances}, as mutualNearest gives them.
 *   first, second: {xy, scores, descriptors, dim}; sizes: {width, height} of the pictures.
 */
export async function openMatcher(ort, matcher) {
  const session = await ort.InferenceSession.create(await download(matcher), { executionProviders: ["wasm"] });
  return async (first, second, firstSize, secondSize) => {
    const rows = Math.max(first.scores.length, second.scores.length);
    if (!first.scores.length || !second.scores.length) return { rows: new Int32Array(), distances: new Float32Array() };
    const feed = { ...inputs(ort, first, firstSize, rows, 0), ...inputs(ort, second, secondSize, rows, 1) };
    const { matches0, scores0 } = await session.run(feed);
    const sure = [...first.scores.keys()].filter((i) => matches0.data[i] >= 0 && scores0.data[i] > matcher.minScore);
    const pairs = Int32Array.from(sure.flatMap((i) => [i, matches0.data[i]]));
    for (const tensor of [matches0, scores0]) tensor.dispose();
    return { rows: pairs, distances: distancesOf(pairs, first, second) };
  };
}

/** The inputs of one picture, filled up with zeros to a number of rows. */
function inputs(ort, { xy, scores, descriptors, dim }, { width, height }, rows, image) {
  const filled = (values, ...shape) => {
    const data = new Float32Array(shape.reduce((product, size) => product * size, rows));
    data.set(values);
    return new ort.Tensor("float32", data, [1, rows, ...shape]);
  };
  return {
    [`keypoints${image}`]: filled(xy, 2),
    [`keypoint_scores${image}`]: filled(scores),
    [`descriptors${image}`]: filled(descriptors, dim),
    [`count${image}`]: new ort.Tensor("int32", Int32Array.of(scores.length), [1]),
    [`image_size${image}`]: new ort.Tensor("float32", Float32Array.of(width, height), [1, 2]),
  };
}

function distancesOf(pairs, first, second) {
  const { dim } = first;
  return Float32Array.from({ length: pairs.length / 2 }, (_, k) => {
    let squares = 0;
    for (let d = 0; d < dim; d++) {
      squares += (first.descriptors[pairs[2 * k] * dim + d] - second.descriptors[pairs[2 * k + 1] * dim + d]) ** 2;
    }
    return Math.sqrt(squares);
  });
}
