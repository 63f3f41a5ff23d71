// Where pictures come from: files, the example and its warped copy, the camera. Each becomes a canvas.

import { apply, fromUnitSquare, multiply } from "./homography.js";

const SMALLEST_SIDE_PX = 8;
const MOST_PIXELS = 1 << 24; // some browsers draw no larger canvas
const CAMERA_SIDE_PX = 640;
const EXPOSURE = 0.6;
const SEEN_BY_COPY = [[70, 40], [478, 96], [440, 470], [30, 380]]; // corners, in the photograph, of what its copy shows

/** Reads an image file, upright, without its color profile, on white where it is transparent. */
export async function readPicture(file) {
  const as = { imageOrientation: "from-image", colorSpaceConversion: "none" };
  const name = file.name || "The picture";
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, as);
    if (bitmap.width * bitmap.height > MOST_PIXELS) bitmap = await smaller(file, bitmap, as);
  } catch {
    throw new Error(`${name} is no picture that this browser can read (JPEG, PNG or WebP, say).`);
  }
  if (Math.min(bitmap.width, bitmap.height) < SMALLEST_SIDE_PX) {
    throw new Error(`${name} is ${bitmap.width}x${bitmap.height} px; the smallest usable is 8x8.`);
  }
  return onCanvas(bitmap, bitmap.width, bitmap.height);
}

function smaller(file, { width, height }, as) {
  const scale = Math.sqrt(MOST_PIXELS / (width * height));
  return createImageBitmap(file, {
    ...as,
    resizeWidth: Math.floor(width * scale),
    resizeHeight: Math.floor(height * scale),
    resizeQuality: "high",
  });
}

function onCanvas(source, width, height) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, width, height);
  pen.drawImage(source, 0, 0, width, height);
  return canvas;
}

/** The pixels of a canvas, as the worker takes them. */
export function pixelsOf(canvas) {
  const { width, height } = canvas;
  return { rgba: canvas.getContext("2d").getImageData(0, 0, width, height).data.buffer, width, height };
}

/** The example: a photograph, a turned, tilted and darker copy of it, and the homography between them. */
export async function example() {
  const answer = await fetch("astronaut.jpg").catch(() => null);
  if (!answer?.ok) throw new Error("The example's photograph is missing: astronaut.jpg did not load.");
  const photo = await readPicture(await answer.blob());
  const { width, height } = photo;
  const toPhoto = multiply(fromUnitSquare(SEEN_BY_COPY), [1 / width, 0, 0, 0, 1 / height, 0, 0, 0, 1]);
  return { photo, copy: warp(photo, toPhoto), toPhoto };
}

/** The canvas that shows, at each pixel, what the homography points to in another one; interpolated, darker. */
function warp(canvas, toSource) {
  const { width, height } = canvas;
  const source = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  const made = new ImageData(width, height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const [u, v] = apply(toSource, x, y);
      const [u0, v0] = [Math.floor(u), Math.floor(v)];
      const at = 4 * (v0 * width + u0);
      for (let color = 0; color < 3; color++) {
        const i = at + color;
        const upper = source[i] * (1 - u + u0) + source[i + 4] * (u - u0);
        const lower = source[i + 4 * width] * (1 - u + u0) + source[i + 4 * width + 4] * (u - u0);
        made.data[4 * (y * width + x) + color] = EXPOSURE * (upper * (1 - v + v0) + lower * (v - v0));
      }
      made.data[4 * (y * width + x) + 3] = 255;
    }
  }
  const copy = Object.assign(document.createElement("canvas"), { width, height });
  copy.getContext("2d", { willReadFrequently: true }).putImageData(made, 0, 0);
  return copy;
}

const CAMERA_PROBLEMS = {
  NotAllowedError: "The camera may not be used: allow it for this page in the browser's address bar, then try again.",
  NotFoundError: "There is no camera on this computer.",
  NotReadableError: "The camera is in use by another program.",
};

/** Starts the camera in a video element. */
export async function openCamera(video) {
  if (!navigator.mediaDevices) {
    throw new Error("The camera needs https or this computer's own address (127.0.0.1).");
  }
  try {
    const wish = { width: { ideal: CAMERA_SIDE_PX }, facingMode: "environment" };
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: wish, audio: false });
    await video.play();
  } catch (error) {
    closeCamera(video);
    throw new Error(CAMERA_PROBLEMS[error.name] ?? `The camera did not start: ${error.message}`);
  }
}

export function closeCamera(video) {
  video.srcObject?.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
}

/** The camera's picture of this moment; null before the first one. */
export function cameraFrame(video) {
  const { videoWidth: width, videoHeight: height } = video;
  return width && height ? onCanvas(video, width, height) : null;
}
