// Asks the server; a busy one is asked again a little later.

export class ApiError extends Error {
  constructor(status, problem) {
    super(problem.what);
    this.status = status;
    this.facts = problem.facts;
    this.hint = problem.hint;
  }
}

const TRIES = 4;

async function call(path, parameters, options = {}) {
  const query = new URLSearchParams(parameters).toString();
  for (let attempt = 1; ; attempt += 1) {
    const response = await fetch(`/v1/${path}${query ? `?${query}` : ""}`, options);
    if (response.ok) return response.json();
    if (response.status === 503 && attempt < TRIES) {
      const seconds = Number(response.headers.get("retry-after")) || 1;
      await new Promise((done) => setTimeout(done, seconds * 1000 * attempt));
      continue;
    }
    const document = await response.json().catch(() => ({}));
    throw new ApiError(response.status, document.error ?? { what: `the server answered ${response.status}` });
  }
}

function choices({ k, labels, box }) {
  const parameters = [["k", k], ...labels.map((label) => ["label", label])];
  if (box) parameters.push(["box", box]);
  return parameters;
}

export const searchFile = (file, asked, signal) =>
  call("search", choices(asked), {
    method: "POST",
    body: file,
    headers: { "content-type": file.type.startsWith("image/") ? file.type : "application/octet-stream" },
    signal,
  });

export const searchPicture = (id, asked, signal) =>
  call("search", [["id", id], ...choices(asked)], { signal });

export const info = () => call("info");
export const labels = (contains) => call("labels", { contains, limit: 100 });
export const somePictures = (count) => call("pictures", { count });
export const imageOf = (id, size = "small") => `/v1/pictures/${id}/image?size=${size}`;
