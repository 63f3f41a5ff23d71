// Matches two sets of keypoints: mutual nearest neighbors, as src/superpoint_trt/match/nearest.py, by unit descriptors.

/**
 * @param first {descriptors: Float32Array (N x dim), dim}; rows of unit length.
 * @param second as first.
 * @returns {{rows: Int32Array, distances: Float32Array}} pairs of rows, in the order of the first set; L2 distances.
 */
export function mutualNearest(first, second) {
  const { dim } = first;
  const [a, b] = [first.descriptors, second.descriptors];
  const [n, m] = [a.length / dim, b.length / dim];
  const nearest = new Int32Array(n);
  const best = new Float32Array(n).fill(-Infinity);
  const back = new Int32Array(m);
  const bestBack = new Float32Array(m).fill(-Infinity);
  // Of unit vectors the largest product is the smallest distance. Of equal ones the lowest row wins.
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < m; j++) {
      const product = Math.fround(dot(a, i * dim, b, j * dim, dim));
      if (product > best[i]) [best[i], nearest[i]] = [product, j];
      if (product > bestBack[j]) [bestBack[j], back[j]] = [product, i];
    }
  }
  const rows = [];
  const distances = [];
  for (let i = 0; i < n && m > 0; i++) {
    if (back[nearest[i]] !== i) continue;
    rows.push(i, nearest[i]);
    distances.push(Math.sqrt(Math.max(2 - 2 * best[i], 0)));
  }
  return { rows: Int32Array.from(rows), distances: Float32Array.from(distances) };
}

/** Four sums at a time: a processor adds them side by side. */
function dot(a, i, b, j, dim) {
  let [s0, s1, s2, s3] = [0, 0, 0, 0];
  let k = 0;
  for (; k + 3 < dim; k += 4) {
    s0 += a[i + k] * b[j + k];
    s1 += a[i + k + 1] * b[j + k + 1];
    s2 += a[i + k + 2] * b[j + k + 2];
    s3 += a[i + k + 3] * b[j + k + 3];
  }
  for (; k < dim; k++) s0 += a[i + k] * b[j + k];
  return s0 + s1 + s2 + s3;
}
