// The ranked pictures. All text comes from the server as text and is put in as text.

import { imageOf } from "./api.js";

export function make(tag, className, text) {
  const one = document.createElement(tag);
  if (className) one.className = className;
  if (text !== undefined) one.textContent = text;
  return one;
}

/** A path that may break after slashes and underscores. */
function makePath(name) {
  const one = make("div", "path");
  for (const part of name.split(/(?<=[/_])/)) one.append(part, document.createElement("wbr"));
  return one;
}

export const nameOf = (picture) => picture.path ?? `picture ${picture.id}`;
export const scoreText = (score) => score.toFixed(4);

/** Cards for pictures: found ones with rank, score and verdict, others with their name alone. */
export function cards(pictures, { onSearch, onCompare }) {
  return pictures.map((picture) => {
    const item = make("li", "hit");
    item.dataset.id = picture.id;
    const look = make("button", "look");
    look.type = "button";
    const image = make("img");
    image.alt = "";
    image.loading = "lazy";
    image.src = imageOf(picture.id);
    image.addEventListener("error", () => image.replaceWith(make("span", "gone", "cannot be shown")));
    look.append(image);
    look.setAttribute("aria-label", spoken(picture));
    look.title = "Search on with this picture";
    look.addEventListener("click", () => onSearch(picture));
    const facts = make("div", "facts");
    if (picture.rank !== undefined) {
      const line = make("div", "line");
      line.append(make("span", "rank", `${picture.rank}`), make("span", "score", scoreText(picture.score)));
      if (picture.verdict) line.append(make("span", `tag ${picture.verdict}`, picture.verdict));
      facts.append(line);
    }
    if (picture.label) facts.append(make("div", "label", picture.label));
    facts.append(makePath(nameOf(picture)));
    item.append(look, facts);
    if (onCompare) {
      const compare = make("button", "with", "Compare");
      compare.type = "button";
      compare.setAttribute("aria-label", `Compare result ${picture.rank} with the query`);
      compare.addEventListener("click", () => onCompare(picture));
      item.append(compare);
    }
    return item;
  });
}

function spoken(picture) {
  const name = [picture.label, nameOf(picture)].filter(Boolean).join(", ");
  if (picture.rank === undefined) return `Search with ${name}`;
  const verdict = picture.verdict ? `, ${picture.verdict}` : "";
  return `Result ${picture.rank}, score ${scoreText(picture.score)}${verdict}: ${name}. Search on with it`;
}

/** The sentence above the results, read out when it changes. */
export function summary(answer, labels) {
  const count = answer.hits.length;
  const among = labels.length ? ` labelled ${labels.join(" or ")}` : "";
  if (!count) return `No pictures${among}`;
  const verdict = { match: "A match", unsure: "Perhaps a match", none: "None near enough to be sure" }[answer.verdict];
  const nearest = `${count} nearest ${count === 1 ? "picture" : "pictures"}${among}`;
  return verdict ? `${verdict}: the ${nearest}` : `The ${nearest}`;
}
