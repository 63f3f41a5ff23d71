// Draws the pictures, their keypoints and their matches on the canvas.

const AGREE = "#1e9bff";
const OTHER = "#ff8c1a";
const POINT = "#ffffff";
const GAP = 8;
const STACKED_BELOW = 700; // CSS px of the canvas
const TALLEST = 0.72; // of the window
const MOST_LINES = 150;
const PX_PER_LINE = 7; // of the canvas's width: a narrow one gets fewer lines

/**
 * @param canvas to draw on; it gets the height that the pictures need.
 * @param {{a?: CanvasImageSource, b?: CanvasImageSource}} pictures with width and height.
 * @param result of the worker, or null: pictures alone.
 * @returns {number} how many matches are drawn: a line for each would hide the pictures.
 */
export function draw(canvas, pictures, result) {
  const shown = ["a", "b"].filter((slot) => pictures[slot]);
  const layout = arrange(canvas.clientWidth, shown.map((slot) => pictures[slot]));
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(canvas.clientWidth * scale);
  canvas.height = Math.round(layout.height * scale);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const boxes = Object.fromEntries(shown.map((slot, i) => [slot, layout.boxes[i]]));
  for (const slot of shown) {
    const { x, y, width, height } = boxes[slot];
    pen.drawImage(pictures[slot], x, y, width, height);
  }
  if (!result) return 0;
  for (const slot of shown) if (result.features[slot]) drawPoints(pen, result.features[slot].xy, boxes[slot]);
  return result.match && boxes.a && boxes.b ? drawMatches(pen, result, boxes) : 0;
}

/** Where the pictures lie: side by side, or below each other where there is no room; none is enlarged out of the window. */
function arrange(width, pictures) {
  const tallest = Math.max(240, window.innerHeight * TALLEST);
  const stacked = width < STACKED_BELOW && pictures.length > 1;
  if (stacked) {
    let y = 0;
    const boxes = pictures.map((picture) => {
      const height = (picture.height / picture.width) * width;
      const box = { x: 0, y, width, height, scale: width / picture.width };
      y += height + GAP;
      return box;
    });
    return { boxes, height: y - GAP };
  }
  const ratios = pictures.map((picture) => picture.width / picture.height);
  const room = width - GAP * (pictures.length - 1);
  const height = Math.min(room / ratios.reduce((sum, ratio) => sum + ratio, 0), tallest);
  const used = height * ratios.reduce((sum, ratio) => sum + ratio, 0) + GAP * (pictures.length - 1);
  let x = (width - used) / 2;
  const boxes = pictures.map((picture, i) => {
    const box = { x, y: 0, width: height * ratios[i], height, scale: height / picture.height };
    x += box.width + GAP;
    return box;
  });
  return { boxes, height };
}

/** A picture's pixel on the canvas; pixel centers are at integers. */
function onCanvas(xy, i, box) {
  return [box.x + (xy[2 * i] + 0.5) * box.scale, box.y + (xy[2 * i + 1] + 0.5) * box.scale];
}

function drawPoints(pen, xy, box) {
  pen.fillStyle = POINT;
  pen.strokeStyle = "rgba(0, 0, 0, 0.75)";
  pen.lineWidth = 0.8;
  const radius = pen.canvas.clientWidth < STACKED_BELOW ? 1.2 : 1.7;
  for (let i = 0; i < xy.length / 2; i++) {
    const [x, y] = onCanvas(xy, i, box);
    pen.beginPath();
    pen.arc(x, y, radius, 0, 2 * Math.PI);
    pen.fill();
    pen.stroke();
  }
}

function drawMatches(pen, { features, match }, boxes) {
  const order = Array.from(match.distances.keys()); // by falling score in the first picture
  const isAgreeing = (k) => match.agree !== null && match.agree[k] === 1;
  const line = (k) => {
    const [x0, y0] = onCanvas(features.a.xy, match.rows[2 * k], boxes.a);
    const [x1, y1] = onCanvas(features.b.xy, match.rows[2 * k + 1], boxes.b);
    pen.beginPath();
    pen.moveTo(x0, y0);
    pen.lineTo(x1, y1);
    pen.stroke();
    for (const [x, y] of [[x0, y0], [x1, y1]]) {
      pen.beginPath();
      pen.arc(x, y, 2.4, 0, 2 * Math.PI);
      pen.fill();
    }
  };
  const ink = (color, width, opacity) => {
    pen.strokeStyle = pen.fillStyle = color;
    pen.lineWidth = width;
    pen.globalAlpha = opacity;
  };
  const most = Math.min(MOST_LINES, Math.round(pen.canvas.clientWidth / PX_PER_LINE));
  const { agree, other } = chosenLines(order.filter(isAgreeing), order.filter((k) => !isAgreeing(k)), most);
  ink(OTHER, 0.8, 0.6);
  other.forEach(line);
  ink(AGREE, 1.3, 0.9);
  agree.forEach(line);
  pen.globalAlpha = 1;
  return agree.length + other.length;
}

/** At most so many lines in all; a fifth may be of other matches, more where few agree. As run/draw.py's chosen_lines. */
export function chosenLines(agreeing, others, most) {
  const room = Math.max(Math.floor(most / 5), most - agreeing.length);
  const other = spread(others, room);
  return { agree: spread(agreeing, most - other.length), other };
}

/** At most so many of a list, taken evenly from its whole length. */
function spread(list, most) {
  const step = Math.max(1, list.length / most);
  return Array.from({ length: Math.min(list.length, most) }, (_, i) => list[Math.floor(i * step)]);
}
