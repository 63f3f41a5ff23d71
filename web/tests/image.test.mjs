import assert from "node:assert/strict";
import { test } from "node:test";

import { place, toGray, toInput, toPicture } from "../src/image.js";

test("a picture keeps its size and is padded to whole cells", () => {
  const placement = place(101, 77);
  assert.deepEqual([placement.placedWidth, placement.placedHeight], [101, 77]);
  assert.deepEqual([placement.inputWidth, placement.inputHeight], [104, 80]);
});

test("the longer side is shrunk, rounded as Python rounds", () => {
  assert.deepEqual(Object.values(place(1280, 722, 640)), [1280, 722, 640, 361, 640, 368]);
  assert.equal(place(400, 5, 200).placedHeight, 2); // 2.5
  assert.equal(place(400, 7, 200).placedHeight, 4); // 3.5
  assert.equal(place(320, 240, 640).placedWidth, 320);
});

test("gray is BT.601's luma", () => {
  const gray = toGray(Uint8ClampedArray.from([255, 0, 0, 9, 0, 255, 0, 9, 0, 0, 255, 9, 255, 255, 255, 9]), 4);
  for (const [i, value] of [0.299, 0.587, 0.114, 1].entries()) assert.ok(Math.abs(gray[i] - value) < 1e-6);
});

test("padding repeats the last column and row", () => {
  const placement = place(9, 9);
  const gray = Float32Array.from({ length: 81 }, (_, i) => i);
  const input = toInput(gray, placement);
  assert.equal(input.length, 256);
  assert.deepEqual([input[0], input[8], input[15], input[8 * 16], input[255]], [0, 8, 8, 72, 80]);
});

test("a pixel of a shrunk picture is the mean of the area that it covers", () => {
  const placement = { width: 3, height: 1, placedWidth: 2, placedHeight: 1, inputWidth: 8, inputHeight: 8 };
  const input = toInput(Float32Array.from([3, 6, 9]), placement);
  assert.deepEqual([...input.subarray(0, 3)], [4, 8, 8]);
});

test("points come back to the picture's pixels by their centers", () => {
  const placement = { width: 100, height: 60, placedWidth: 50, placedHeight: 20 };
  assert.deepEqual([...toPicture(Float32Array.from([0, 0, 49, 19]), placement)], [0.5, 1, 98.5, 58]);
});
