// Score map and descriptor grid -> keypoints, as src/superpoint_trt/run/decode.py does. Tests hold both equal.

const SUBPIXEL_REACH_PX = 2;
const NORM_EPS = 1e-12;

export const DEFAULTS = {
  threshold: 0.005,
  maxKeypoints: 1000,
  subpixel: true,
  nmsRadiusPx: 4,
  removeBordersPx: 4,
};

/**
 * Finds the keypoints of one picture.
 *
 * @param {{scores: Float32Array, descriptors: Float32Array, dim: number}} outputs of the network: scores
 *   (inputHeight x inputWidth) before suppression, descriptors (dim x cells) of unit length.
 * @param placement where the picture lies in the network's input (image.js).
 * @param options as DEFAULTS.
 * @param {{stridePx: number, sampling: "half-pixel" | "legacy"}} model
 * @returns xy in pixels of the network's input, scores, descriptors, by falling score.
 */
export function decode(outputs, placement, options, model) {
  const scores = cutPadding(outputs.scores, placement);
  const { placedWidth: width, placedHeight: height } = placement;
  const found = select(scores, width, height, options);
  const xy = options.subpixel ? refine(found, scores, width, height) : wholePixels(found, width);
  const grid = {
    values: outputs.descriptors,
    dim: outputs.dim,
    columns: placement.inputWidth / model.stridePx,
    rows: placement.inputHeight / model.stridePx,
  };
  return {
    xy,
    scores: Float32Array.from(found, (pixel) => scores[pixel]),
    descriptors: sampleDescriptors(xy, grid, model),
    dim: outputs.dim,
  };
}

function cutPadding(scores, { placedWidth, placedHeight, inputWidth, inputHeight }) {
  if (placedWidth === inputWidth && placedHeight === inputHeight) return scores;
  const cut = new Float32Array(placedWidth * placedHeight);
  for (let y = 0; y < placedHeight; y++) {
    cut.set(scores.subarray(y * inputWidth, y * inputWidth + placedWidth), y * placedWidth);
  }
  return cut;
}

/** The pixels (y * width + x) of the keypoints, by falling score; equal scores in reading order. */
export function select(scores, width, height, options) {
  const border = options.removeBordersPx;
  const kept = suppress(scores, width, height, options).filter((pixel) => {
    const x = pixel % width;
    const y = (pixel - x) / width;
    return x >= border && y >= border && x < width - border && y < height - border;
  });
  return kept.sort((a, b) => scores[b] - scores[a] || a - b).slice(0, options.maxKeypoints);
}

/**
 * Non-maximum suppression in two rounds after the first; equal neighbors all survive.
 *
 * Only pixels above the threshold are looked at: a pixel below it neither survives nor suppresses another.
 */
function suppress(scores, width, height, { threshold, nmsRadiusPx: radius }) {
  const least = Math.fround(threshold);
  const rest = new Float32Array(scores.length);
  let candidates = [];
  for (let pixel = 0; pixel < scores.length; pixel++) {
    if (scores[pixel] > least) {
      rest[pixel] = scores[pixel];
      candidates.push(pixel);
    }
  }
  const isHighest = (pixel) => !someNear(pixel, width, height, radius, (other) => rest[other] > rest[pixel]);
  const survivors = [];
  for (let round = 0; round < 3; round++) {
    const kept = candidates.filter(isHighest);
    for (const pixel of kept) survivors.push(pixel);
    for (const pixel of kept) clearNear(rest, pixel, width, height, radius);
    candidates = candidates.filter((pixel) => rest[pixel] > 0);
  }
  return survivors;
}

function someNear(pixel, width, height, radius, holds) {
  const x = pixel % width;
  const y = (pixel - x) / width;
  const right = Math.min(x + radius, width - 1);
  const bottom = Math.min(y + radius, height - 1);
  for (let row = Math.max(y - radius, 0); row <= bottom; row++) {
    for (let other = row * width + Math.max(x - radius, 0); other <= row * width + right; other++) {
      if (holds(other)) return true;
    }
  }
  return false;
}

function clearNear(rest, pixel, width, height, radius) {
  const x = pixel % width;
  const y = (pixel - x) / width;
  const left = Math.max(x - radius, 0);
  const right = Math.min(x + radius, width - 1);
  const bottom = Math.min(y + radius, height - 1);
  for (let row = Math.max(y - radius, 0); row <= bottom; row++) {
    rest.fill(0, row * width + left, row * width + right + 1);
  }
}

function wholePixels(found, width) {
  const xy = new Float32Array(2 * found.length);
  found.forEach((pixel, i) => {
    xy[2 * i] = pixel % width;
    xy[2 * i + 1] = Math.floor(pixel / width);
  });
  return xy;
}

/** Moves points to the center of the scores in the 5x5 pixels around them; pixels outside the picture count 0. */
export function refine(found, scores, width, height) {
  const xy = new Float32Array(2 * found.length);
  const reach = SUBPIXEL_REACH_PX;
  found.forEach((pixel, i) => {
    const x = pixel % width;
    const y = (pixel - x) / width;
    let [sum, sumX, sumY] = [0, 0, 0];
    for (let dy = Math.max(-reach, -y); dy <= Math.min(reach, height - 1 - y); dy++) {
      for (let dx = Math.max(-reach, -x); dx <= Math.min(reach, width - 1 - x); dx++) {
        const weight = scores[pixel + dy * width + dx];
        sum += weight;
        sumX += weight * dx;
        sumY += weight * dy;
      }
    }
    xy[2 * i] = x + sumX / sum; // the point itself is above a threshold, so the sum is positive
    xy[2 * i + 1] = y + sumY / sum;
  });
  return xy;
}

/** Interpolates descriptors bilinearly at points and scales them to unit length; N rows of dim. */
export function sampleDescriptors(xy, { values, dim, columns, rows }, { stridePx, sampling }) {
  const count = xy.length / 2;
  const found = new Float32Array(count * dim);
  const cells = columns * rows;
  for (let i = 0; i < count; i++) {
    const [x0, x1, fx] = corners(xy[2 * i], columns, stridePx, sampling);
    const [y0, y1, fy] = corners(xy[2 * i + 1], rows, stridePx, sampling);
    const [a, b, c, d] = [y0 * columns + x0, y0 * columns + x1, y1 * columns + x0, y1 * columns + x1];
    let squares = 0;
    for (let k = 0; k < dim; k++) {
      const at = k * cells;
      const upper = values[at + a] * (1 - fx) + values[at + b] * fx;
      const lower = values[at + c] * (1 - fx) + values[at + d] * fx;
      const value = upper * (1 - fy) + lower * fy;
      found[i * dim + k] = value;
      squares += value * value;
    }
    const length = Math.max(Math.sqrt(squares), NORM_EPS);
    for (let k = 0; k < dim; k++) found[i * dim + k] /= length;
  }
  return found;
}

/** Along one axis: the two cells around a pixel, and how far it lies from the first to the second. */
function corners(pixel, cells, stridePx, sampling) {
  const position =
    sampling === "legacy"
      ? ((pixel - stridePx / 2 + 0.5) / (cells * stridePx - stridePx / 2 - 0.5)) * (cells - 1)
      : (pixel + 0.5) / stridePx - 0.5;
  const inside = Math.min(Math.max(position, 0), cells - 1);
  const first = Math.min(Math.floor(inside), Math.max(cells - 2, 0));
  return [first, Math.min(first + 1, cells - 1), inside - first];
}
