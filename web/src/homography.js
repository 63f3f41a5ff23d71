// Homographies as 9 numbers, row by row: the warp of the example, and the one that most matches agree with.

/** The homography that takes the unit square's corners (0,0), (1,0), (1,1), (0,1) to four points [[x, y], ...]. */
export function fromUnitSquare([[x0, y0], [x1, y1], [x2, y2], [x3, y3]]) {
  const [dx1, dx2, sx] = [x1 - x2, x3 - x2, x0 - x1 + x2 - x3];
  const [dy1, dy2, sy] = [y1 - y2, y3 - y2, y0 - y1 + y2 - y3];
  const area = dx1 * dy2 - dx2 * dy1;
  const g = (sx * dy2 - dx2 * sy) / area;
  const h = (dx1 * sy - sx * dy1) / area;
  return [x1 - x0 + g * x1, x3 - x0 + h * x3, x0, y1 - y0 + g * y1, y3 - y0 + h * y3, y0, g, h, 1];
}

/** The homography that takes four points to four others. */
export function fromFour(from, to) {
  return multiply(fromUnitSquare(to), inverse(fromUnitSquare(from)));
}

export function multiply(a, b) {
  return a.map((_, at) => {
    const [row, column] = [at - (at % 3), at % 3];
    return a[row] * b[column] + a[row + 1] * b[column + 3] + a[row + 2] * b[column + 6];
  });
}

/** The inverse, up to a factor, which a homography does not notice. */
export function inverse([a, b, c, d, e, f, g, h, i]) {
  return [
    e * i - f * h, c * h - b * i, b * f - c * e,
    f * g - d * i, a * i - c * g, c * d - a * f,
    d * h - e * g, b * g - a * h, a * e - b * d,
  ];
}

export function apply(H, x, y) {
  const w = H[6] * x + H[7] * y + H[8];
  return [(H[0] * x + H[1] * y + H[2]) / w, (H[3] * x + H[4] * y + H[5]) / w];
}

const MOST_TRIES = 1000;
const WITHIN_PX = 3;
const FEWEST = 12; // chance alone makes about seven of 500 wrong matches agree
const MOST_FITS = 5;

/**
 * Which matches agree with one homography (RANSAC; Fischler and Bolles 1981). A homography of four matches is as inexact as their
 * points, so the best ones are fitted to all that agree (Chum et al. 2003).
 *
 * @param xyA places in the first picture of all keypoints, x and y by turns; xyB in the second.
 * @param rows pairs of keypoints.
 * @returns {Uint8Array | null} 1 for each match that agrees; null: no homography has enough of them.
 */
export function agreeing(xyA, xyB, rows) {
  const count = rows.length / 2;
  if (count < FEWEST) return null;
  const next = randomNumbers(1);
  let [best, most, needed] = [null, 0, MOST_TRIES];
  for (let round = 0; round < needed; round++) {
    const four = Array.from({ length: 4 }, () => next() % count);
    const place = (xy, side) => four.map((k) => [xy[2 * rows[2 * k + side]], xy[2 * rows[2 * k + side] + 1]]);
    const H = fromFour(place(xyA, 0), place(xyB, 1));
    if (!H.every(Number.isFinite)) continue;
    const agree = within(H, xyA, xyB, rows, WITHIN_PX);
    if (counted(agree) <= most) continue;
    best = widened(agree, xyA, xyB, rows);
    most = counted(best);
    // So many tries draw four agreeing matches at least once, but for one case in a thousand.
    needed = Math.min(MOST_TRIES, Math.log(0.001) / Math.log(1 - Math.min((most / count) ** 4, 0.999)));
  }
  return most >= FEWEST ? best : null;
}

const counted = (agree) => agree.reduce((sum, one) => sum + one, 0);

/** The matches that agree with the homography fitted to those that agree, as long as they become more. */
function widened(agree, xyA, xyB, rows) {
  for (let round = 0; round < MOST_FITS; round++) {
    const H = fitted(xyA, xyB, rows, agree);
    const more = H ? within(H, xyA, xyB, rows, WITHIN_PX) : agree;
    if (counted(more) <= counted(agree)) break;
    agree = more;
  }
  return agree;
}

/**
 * The homography with the least algebraic error for some matches (Hartley and Zisserman 2004, sections 4.1 and 4.4.4).
 *
 * @param agree 1 for each match that counts, at least four.
 * @returns 9 numbers, or null: the points do not determine one.
 */
export function fitted(xyA, xyB, rows, agree) {
  const used = Array.from(agree.keys()).filter((k) => agree[k]);
  const placed = (xy, side) => used.map((k) => [xy[2 * rows[2 * k + side]], xy[2 * rows[2 * k + side] + 1]]);
  const [a, b] = [placed(xyA, 0), placed(xyB, 1)];
  const [toA, toB] = [centred(a), centred(b)];
  // Normal equations of eight unknowns; the ninth is 1, since the middle of the points is not taken to infinity.
  const rowsOf8 = Array.from({ length: 8 }, () => new Float64Array(9));
  for (let k = 0; k < used.length; k++) {
    const [[x, y], [u, v]] = [apply(toA, ...a[k]), apply(toB, ...b[k])];
    for (const line of [[x, y, 1, 0, 0, 0, -u * x, -u * y, u], [0, 0, 0, x, y, 1, -v * x, -v * y, v]]) {
      for (let i = 0; i < 8; i++) for (let j = 0; j < 9; j++) rowsOf8[i][j] += line[i] * line[j];
    }
  }
  const found = solved(rowsOf8);
  const H = multiply(inverse(toB), multiply([...found, 1], toA));
  return H.every(Number.isFinite) ? H : null;
}

/** The similarity that takes points to the middle 0 and the mean distance 1 from it, as a homography. */
function centred(points) {
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const [x, y] = [0, 1].map((axis) => mean(points.map((point) => point[axis])));
  const scale = 1 / mean(points.map((point) => Math.hypot(point[0] - x, point[1] - y)));
  return [scale, 0, -scale * x, 0, scale, -scale * y, 0, 0, 1];
}

/** Solves n equations [coefficients..., right side], which it overwrites, by Gauss's elimination with pivots. */
function solved(equations) {
  const n = equations.length;
  for (let i = 0; i < n; i++) {
    let pivot = i;
    for (let k = i + 1; k < n; k++) if (Math.abs(equations[k][i]) > Math.abs(equations[pivot][i])) pivot = k;
    [equations[i], equations[pivot]] = [equations[pivot], equations[i]];
    for (let k = 0; k < n; k++) {
      if (k === i) continue;
      const factor = equations[k][i] / equations[i][i];
      for (let j = i; j <= n; j++) equations[k][j] -= factor * equations[i][j];
    }
  }
  return equations.map((equation, i) => equation[n] / equation[i]);
}

/** 1 for each match whose second point lies within some px of where a homography takes the first. */
export function within(H, xyA, xyB, rows, px) {
  const agree = new Uint8Array(rows.length / 2);
  for (let k = 0; k < agree.length; k++) {
    const [i, j] = [2 * rows[2 * k], 2 * rows[2 * k + 1]];
    const [x, y] = apply(H, xyA[i], xyA[i + 1]);
    const [dx, dy] = [x - xyB[j], y - xyB[j + 1]];
    agree[k] = dx * dx + dy * dy <= px * px ? 1 : 0;
  }
  return agree;
}

/** Repeatable random whole numbers (Marsaglia's xorshift): the same matches give the same answer. */
function randomNumbers(seed) {
  let state = seed;
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return state >>> 0;
  };
}
