// Turns a picture into the network's input, as src/superpoint_trt/core/image.py does. Tests hold both equal.

export const STRIDE_PX = 8;

/** Where a picture lies in the network's input: shrunk if it must be, at the top left, padded right and below. */
export function place(width, height, maxSidePx = null) {
  const scale = maxSidePx === null ? 1 : Math.min(1, maxSidePx / Math.max(width, height));
  const shrink = (side) => (scale === 1 ? side : Math.max(1, roundHalfEven(side * scale)));
  const wholeCells = (side) => Math.ceil(side / STRIDE_PX) * STRIDE_PX;
  const placedWidth = shrink(width);
  const placedHeight = shrink(height);
  return {
    width,
    height,
    placedWidth,
    placedHeight,
    inputWidth: wholeCells(placedWidth),
    inputHeight: wholeCells(placedHeight),
  };
}

/** Python's round(). */
function roundHalfEven(value) {
  const below = Math.floor(value);
  const rest = value - below;
  if (rest !== 0.5) return Math.round(value);
  return below % 2 === 0 ? below : below + 1;
}

/** RGBA bytes to gray in [0, 1], BT.601; alpha is ignored. */
export function toGray(rgba, pixels) {
  const gray = new Float32Array(pixels);
  for (let i = 0, at = 0; i < pixels; i++, at += 4) {
    gray[i] = (0.299 * rgba[at] + 0.587 * rgba[at + 1] + 0.114 * rgba[at + 2]) / 255;
  }
  return gray;
}

/** Gray picture to the network's input: shrunk by area, padded by repeating the last column and row. */
export function toInput(gray, placement) {
  const { placedWidth, placedHeight, inputWidth, inputHeight } = placement;
  const placed = shrinkByArea(gray, placement);
  const input = new Float32Array(inputWidth * inputHeight);
  for (let y = 0; y < inputHeight; y++) {
    const from = Math.min(y, placedHeight - 1) * placedWidth;
    const to = y * inputWidth;
    input.set(placed.subarray(from, from + placedWidth), to);
    input.fill(placed[from + placedWidth - 1], to + placedWidth, to + inputWidth);
  }
  return input;
}

/** Each pixel becomes the mean of the area it covers, as OpenCV's INTER_AREA. */
function shrinkByArea(gray, { width, height, placedWidth, placedHeight }) {
  if (width === placedWidth && height === placedHeight) return gray;
  const columns = covered(width, placedWidth);
  const rows = covered(height, placedHeight);
  const narrow = new Float32Array(placedWidth * height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < placedWidth; x++) {
      const { first, weights } = columns[x];
      let sum = 0;
      for (let k = 0; k < weights.length; k++) sum += weights[k] * gray[y * width + first + k];
      narrow[y * placedWidth + x] = sum;
    }
  }
  const placed = new Float32Array(placedWidth * placedHeight);
  for (let y = 0; y < placedHeight; y++) {
    const { first, weights } = rows[y];
    for (let x = 0; x < placedWidth; x++) {
      let sum = 0;
      for (let k = 0; k < weights.length; k++) sum += weights[k] * narrow[(first + k) * placedWidth + x];
      placed[y * placedWidth + x] = sum;
    }
  }
  return placed;
}

/** For each pixel of the short line: the first pixel of the long line that it covers, and the share of each. */
function covered(long, short) {
  const scale = long / short;
  return Array.from({ length: short }, (_, index) => {
    const start = index * scale;
    const end = Math.min(start + scale, long);
    const first = Math.floor(start + 1e-9);
    const last = Math.min(Math.ceil(end - 1e-9), long);
    const shares = [];
    for (let pixel = first; pixel < last; pixel++) {
      shares.push(Math.min(pixel + 1, end) - Math.max(pixel, start));
    }
    const total = shares.reduce((sum, share) => sum + share, 0);
    return { first, weights: shares.map((share) => share / total) };
  });
}

/** Points from pixels of the network's input to pixels of the picture, in place. Pixel centers are at integers. */
export function toPicture(xy, { width, height, placedWidth, placedHeight }) {
  if (width === placedWidth && height === placedHeight) return xy;
  const scale = [width / placedWidth, height / placedHeight];
  for (let i = 0; i < xy.length; i++) xy[i] = (xy[i] + 0.5) * scale[i % 2] - 0.5;
  return xy;
}
