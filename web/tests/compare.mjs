// Runs the page's own code on arrays that Python wrote, for tests/web/test_equal.py: node compare.mjs FOLDER

import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

import { decode } from "../src/decode.js";
import { place, toGray, toInput, toPicture } from "../src/image.js";
import { mutualNearest } from "../src/match.js";

const folder = process.argv[2];
const bytes = (name) => new Uint8Array(readFileSync(join(folder, name))).buffer;
const floats = (name) => new Float32Array(bytes(name));
const write = (name, array) => writeFileSync(join(folder, name), Buffer.from(array.buffer));

const { width, height, maxSidePx, options, model, dim } = JSON.parse(readFileSync(join(folder, "case.json"), "utf8"));
const placement = place(width, height, maxSidePx);
write("input.out", toInput(toGray(new Uint8ClampedArray(bytes("rgba")), width * height), placement));
const outputs = { scores: floats("scores"), descriptors: floats("descriptors"), dim };
const found = decode(outputs, placement, options, model);
write("points.out", toPicture(found.xy, placement));
write("scores.out", found.scores);
write("descriptors.out", found.descriptors);
const { rows, distances } = mutualNearest(found, { descriptors: floats("others"), dim });
write("rows.out", rows);
write("distances.out", distances);
