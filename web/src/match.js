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
  const products = new Float32Array(m);
  for (let i = 0; i < n; i++) {
    multiplyRows(products, a.subarray(i * dim, (i + 1) * dim), b);
    for (let j = 0; j < m; j++) {
      const product = products[j];
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

/** The products of one row with all others, four at a time: each number of the row is then read once for four. */
function multiplyRows(products, row, others) {
  const dim = row.length;
  const whole = products.length - (products.length % 4);
  for (let j = 0; j < whole; j += 4) {
    const [at0, at1, at2, at3] = [j * dim, (j + 1) * dim, (j + 2) * dim, (j + 3) * dim];
    let [s0, s1, s2, s3] = [0, 0, 0, 0];
    for (let k = 0; k < dim; k++) {
      const value = row[k];
      s0 += value * others[at0 + k];
      s1 += value * others[at1 + k];
      s2 += value * others[at2 + k];
      s3 += value * others[at3 + k];
    }
    products[j] = s0;
    products[j + 1] = s1;
    products[j + 2] = s2;
    products[j + 3] = s3;
  }
  for (let j = whole; j < products.length; j++) {
    let sum = 0;
    for (let k = 0; k < dim; k++) sum += row[k] * others[j * dim + k];
    products[j] = sum;
  }
}
