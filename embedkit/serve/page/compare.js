// Two pictures side by side, or one laid over the other: the query and a hit, or any two hits.

import { imageOf } from "./api.js";
import { make, nameOf, scoreText } from "./results.js";

const element = (id) => document.getElementById(id);

export class Compare {
  constructor() {
    this.dialog = element("compare");
    this.over = make("div", "over-frame");
    this.over.append(make("img"), make("img"));
    element("sides").append(this.over);
    element("close").addEventListener("click", () => this.dialog.close());
    element("overlay").addEventListener("change", () =>
      element("sides").classList.toggle("over", element("overlay").checked),
    );
    for (const side of ["left", "right"]) {
      element(`${side}-side`).addEventListener("change", () => this.show());
    }
    this.dialog.addEventListener("keydown", (event) => this.step(event));
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close();
    });
  }

  /** `query` is {src, name}; `shown` the hit that opens on the right. */
  open(query, hits, shown) {
    this.pictures = [
      { title: `Query: ${query.name}`, src: query.src, facts: query.name },
      ...hits.map((hit) => ({
        title: `${hit.rank}: ${[hit.label, nameOf(hit)].filter(Boolean).join(", ")}`,
        src: imageOf(hit.id, "large"),
        facts: [`score ${scoreText(hit.score)}`, hit.verdict, hit.label, nameOf(hit)].filter(Boolean).join(" · "),
      })),
    ];
    for (const side of ["left", "right"]) {
      element(`${side}-side`).replaceChildren(
        ...this.pictures.map((picture, number) => {
          const option = make("option", "", picture.title);
          option.value = number;
          return option;
        }),
      );
    }
    element("left-side").value = 0;
    element("right-side").value = hits.indexOf(shown) + 1;
    this.show();
    this.dialog.showModal();
    element("close").focus();
  }

  show() {
    ["left", "right"].forEach((side, place) => {
      const picture = this.pictures[element(`${side}-side`).value];
      element(`${side}-picture`).src = picture.src;
      element(`${side}-picture`).alt = picture.title;
      element(`${side}-facts`).textContent = picture.facts;
      this.over.children[place].src = picture.src;
      this.over.children[place].alt = "";
    });
  }

  step(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.target.tagName === "SELECT") return;
    const chosen = element("right-side");
    const hits = this.pictures.length - 1;
    chosen.value = ((Number(chosen.value) - 1 + by + hits) % hits) + 1;
    event.preventDefault();
    this.show();
  }
}
