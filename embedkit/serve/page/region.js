// A part of the query picture: drawn with a pointer, or set by four sliders.

const SIDES = ["left", "top", "right", "bottom"];
const WHOLE = { left: 0, top: 0, right: 1, bottom: 1 };
const LEAST = 0.02; // a smaller drag is a click, and gives the whole picture back

const element = (id) => document.getElementById(id);

export class Region {
  constructor(onChange) {
    this.box = { ...WHOLE };
    this.onChange = onChange;
    this.stage = element("stage");
    this.stage.addEventListener("pointerdown", (event) => this.begin(event));
    for (const side of SIDES) {
      element(side).addEventListener("input", () => this.slide(side));
      element(side).addEventListener("change", () => this.onChange());
    }
    element("whole").addEventListener("click", () => {
      this.set(null);
      this.onChange();
    });
    this.show();
  }

  get isWhole() {
    return SIDES.every((side) => this.box[side] === WHOLE[side]);
  }

  /** As the API takes it: "0.25,0,1,0.75"; null is the whole picture. */
  get text() {
    return this.isWhole ? null : SIDES.map((side) => String(Number(this.box[side].toFixed(4)))).join(",");
  }

  set(text) {
    const numbers = text ? text.split(",").map(Number) : [];
    const [left, top, right, bottom] = numbers;
    const sound = numbers.length === 4 && 0 <= left && left < right && right <= 1 && 0 <= top && top < bottom && bottom <= 1;
    this.box = sound ? { left, top, right, bottom } : { ...WHOLE };
    this.show();
  }

  begin(event) {
    if (event.button !== 0) return;
    const frame = this.stage.getBoundingClientRect();
    const share = (moved) => ({
      x: Math.min(Math.max((moved.clientX - frame.left) / frame.width, 0), 1),
      y: Math.min(Math.max((moved.clientY - frame.top) / frame.height, 0), 1),
    });
    const start = share(event);
    const before = this.text;
    const move = (moved) => {
      const now = share(moved);
      this.box = {
        left: Math.min(start.x, now.x),
        top: Math.min(start.y, now.y),
        right: Math.max(start.x, now.x),
        bottom: Math.max(start.y, now.y),
      };
      this.show();
    };
    const end = () => {
      this.stage.removeEventListener("pointermove", move);
      this.stage.removeEventListener("pointerup", end);
      this.stage.removeEventListener("pointercancel", end);
      const { left, top, right, bottom } = this.box;
      if (right - left < LEAST || bottom - top < LEAST) this.box = { ...WHOLE };
      this.show();
      if (this.text !== before) this.onChange();
    };
    event.preventDefault();
    this.stage.setPointerCapture(event.pointerId);
    this.stage.addEventListener("pointermove", move);
    this.stage.addEventListener("pointerup", end);
    this.stage.addEventListener("pointercancel", end);
  }

  slide(side) {
    this.box[side] = Number(element(side).value) / 100;
    // The opposite side gives way, so that the region never turns inside out.
    const least = 0.01;
    if (side === "left") this.box.right = Math.max(this.box.right, this.box.left + least);
    if (side === "top") this.box.bottom = Math.max(this.box.bottom, this.box.top + least);
    if (side === "right") this.box.left = Math.min(this.box.left, this.box.right - least);
    if (side === "bottom") this.box.top = Math.min(this.box.top, this.box.bottom - least);
    this.show();
  }

  show() {
    const { left, top, right, bottom } = this.box;
    const mark = element("region");
    mark.hidden = this.isWhole;
    mark.style.left = `${left * 100}%`;
    mark.style.top = `${top * 100}%`;
    mark.style.width = `${(right - left) * 100}%`;
    mark.style.height = `${(bottom - top) * 100}%`;
    element("whole").disabled = this.isWhole;
    for (const side of SIDES) {
      const percent = Math.round(this.box[side] * 100);
      element(side).value = percent;
      element(`out-${side}`).textContent = `${percent} %`;
    }
  }

  /** The region's pixels as a picture of its own; the address of the whole one where it is whole. */
  async cut(image) {
    if (this.isWhole || !image.naturalWidth) return image.src;
    const { left, top, right, bottom } = this.box;
    const canvas = document.createElement("canvas");
    const width = (right - left) * image.naturalWidth;
    const height = (bottom - top) * image.naturalHeight;
    canvas.width = Math.max(1, Math.round(width));
    canvas.height = Math.max(1, Math.round(height));
    canvas
      .getContext("2d")
      .drawImage(image, left * image.naturalWidth, top * image.naturalHeight, width, height, 0, 0, canvas.width, canvas.height);
    const blob = await new Promise((done) => canvas.toBlob(done));
    return URL.createObjectURL(blob);
  }
}
