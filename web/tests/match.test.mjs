import assert from "node:assert/strict";
import { test } from "node:test";

import { mutualNearest } from "../src/match.js";

const set = (...rows) => ({ descriptors: Float32Array.from(rows.flat()), dim: 2 });
const turned = (degrees) => [Math.cos((degrees * Math.PI) / 180), Math.sin((degrees * Math.PI) / 180)];

test("both must be each other's nearest", () => {
  const { rows, distances } = mutualNearest(set(turned(0), turned(10), turned(90)), set(turned(12), turned(95)));
  assert.deepEqual([...rows], [1, 0, 2, 1]);
  assert.ok(Math.abs(distances[0] - 2 * Math.sin(Math.PI / 180)) < 1e-3);
});

test("of equally near ones the lowest row wins", () => {
  const same = set(turned(0), turned(0), turned(0), turned(0), turned(0), turned(0));
  assert.deepEqual([...mutualNearest(same, same).rows], [0, 0]);
});

test("an empty set has no matches", () => {
  assert.equal(mutualNearest(set(), set(turned(0))).rows.length, 0);
  assert.equal(mutualNearest(set(turned(0)), set()).rows.length, 0);
});
