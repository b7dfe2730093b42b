"""What the API says: every document of it, as the OpenAPI description shows it."""

from __future__ import annotations

from pydantic import BaseModel, Field

__all__ = [
    "Answer",
    "Embedding",
    "Found",
    "Health",
    "IndexInfo",
    "Info",
    "Label",
    "Labels",
    "LimitsInfo",
    "ModelInfo",
    "Picture",
    "Pictures",
    "Problem",
    "ProblemDocument",
    "ThresholdsInfo",
    "VectorQuery",
]


class Problem(BaseModel):
    """What happened, the facts, what to do."""

    code: str = Field(description="A stable short word: busy, too-large, not-an-image, ...")
    what: str
    facts: str | None = None
    hint: str | None = None


class ProblemDocument(BaseModel):
    """Every answer that is no success."""

    error: Problem


class Picture(BaseModel):
    """A picture of the catalog."""

    id: int = Field(description="Its number, never given to another.")
    path: str | None = Field(
        description="Below the catalog's folder, or in full where it was added from "
        "elsewhere; null: the names are gone."
    )
    label: str


class Pictures(BaseModel):
    """Pictures of the catalog, in its order."""

    total: int = Field(description="How many it has.")
    pictures: list[Picture]


class Found(Picture):
    """A picture that was found."""

    rank: int = Field(description="1 is the nearest.")
    score: float = Field(description="Higher is nearer: the cosine, or minus the distance.")
    verdict: str | None = Field(description="match, unsure or none; null: not calibrated.")


class Answer(BaseModel):
    """The nearest pictures, nearest first."""

    query: Picture | None = Field(description="The picture of the catalog that asked, or null.")
    verdict: str | None = Field(description="The best of all hits.")
    hits: list[Found]
    elapsed_ms: float


class VectorQuery(BaseModel):
    """A query by vector."""

    vector: list[float] = Field(
        min_length=1,
        max_length=100_000,
        description="As many numbers as the catalog is wide; any length where the metric is "
        "cosine.",
    )


class Embedding(BaseModel):
    """A picture's vector."""

    vector: list[float]
    metric: str
    fingerprint: str = Field(description="Of the model that made it.")


class Label(BaseModel):
    """A label and how many pictures have it."""

    label: str
    count: int


class Labels(BaseModel):
    """Labels in order."""

    total: int = Field(description="How many match, shown here or not.")
    labels: list[Label]


class IndexInfo(BaseModel):
    """The catalog."""

    name: str
    count: int
    dim: int
    metric: str
    labels: int
    changed: bool = Field(description="The file was replaced since; a restart serves the new one.")


class ModelInfo(BaseModel):
    """The model."""

    name: str
    fingerprint: str
    backbone: str
    precision: str
    device: str


class ThresholdsInfo(BaseModel):
    """From `match` up a score is a match, from `unsure` up unsure, below it none."""

    match: float
    unsure: float


class LimitsInfo(BaseModel):
    """What one request may ask for."""

    max_bytes: int
    max_pixels: int
    max_k: int


class Info(BaseModel):
    """What is served."""

    version: str
    index: IndexInfo
    model: ModelInfo
    thresholds: ThresholdsInfo | None
    limits: LimitsInfo


class Health(BaseModel):
    """The server answers."""

    status: str
