"""Recipe section of curation: where user queries come from, which are kept, how they are split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vpo_ray.recipe.base import NO, Fraction, Positive, Section, Source, refuse_unused


class Splits(Section):
    """Shares of the curated queries; they are normalised to a sum of one."""

    sft: Annotated[float, Field(ge=0)] = 0
    dpo: Annotated[float, Field(ge=0)] = 1
    eval: Annotated[float, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _some(self) -> Splits:
        if self.sft + self.dpo + self.eval <= 0:
            raise ValueError("every share is 0: give at least one of sft, dpo, eval a share")
        return self


class Rules(Section):
    """Which queries are dropped, each rule under its own name; none unless given.

    Words are runs without white space, and single characters in scripts that are written without
    it. Special characters are those that are no letter, mark, number or white space. `max_digits: 2`
    is Prompt-A-Video's rule (booster/finetuning/gpt_boost.py). `keywords` is a text file with a word
    or phrase a line (see `vpo_ray.keywords`). `languages` drops what is identified as another
    language with at least `language_confidence`: few words are rarely enough to tell.
    """

    min_words: Positive | None = None
    max_words: Positive | None = None
    max_special_share: Fraction | None = None
    max_digits: Annotated[int, Field(ge=0)] | None = None
    urls: bool = False
    keywords: Source | None = None
    languages: Annotated[list[Annotated[str, NO]], Field(min_length=1)] | None = None
    language_confidence: Fraction = 0.5

    @model_validator(mode="after")
    def _all_used(self) -> Rules:
        if self.languages is None:
            refuse_unused(self, "language_confidence", "without languages")
        return self


class NearDuplicates(Section):
    """Queries are near duplicates from `threshold` on: the Jaccard similarity of their sets of
    `ngram` characters, as `permutations` min-hashes estimate it. The first by id is kept; with
    `drop: false` all are, and only share a split."""

    threshold: Annotated[float, Field(ge=0.3, lt=1)] = 0.8
    ngram: Annotated[int, Field(ge=2, le=20)] = 5
    permutations: Annotated[int, Field(ge=32, le=512)] = 128
    drop: bool = True


class Diversity(Section):
    """How a subset of `queries.size` is chosen.

    farthest_first: one query after another, each as far as possible from those chosen before it, in
    n-gram space; for any number of queries. self_bleu: leave out the query that is most alike to all
    others by BLEU of up to `bleu_order` words, again and again, as VPO (paper 3.2) filters; up to
    100,000 queries.
    """

    method: Literal["farthest_first", "self_bleu"] = "farthest_first"
    bleu_order: Annotated[int, Field(ge=1, le=5)] = 4

    @model_validator(mode="after")
    def _all_used(self) -> Diversity:
        if self.method != "self_bleu":
            refuse_unused(self, "bleu_order", f"with method: {self.method}")
        return self


class Queries(Section):
    """Where user queries come from, and which are dropped (each with a counted reason).

    `limit` takes the first queries, `size` a diverse subset of exactly so many, a share of them
    unsafe where `unsafe_share` says so: then `unsafe_columns` of the input label them, by true or
    false or by a classifier's probability, which must reach `unsafe_threshold` in any of them. With
    `unsafe_judge` the recipe's judge labels what they do not, once duplicates are out.
    `unescape_html` turns `&quot;` of a scraped list into what it stands for; `flags` takes generator
    flags out of the text into a column of their own. `workers` says how many Ray Data tasks curate
    at once: 0 for this process alone, by default that for small input and the cluster for more.
    """

    path: Source | Annotated[list[Source], Field(min_length=1)]
    column: str = "query"
    image_column: str | None = Field(
        None, description="of paths or URIs of images; a relative one is from the file's folder"
    )
    limit: Positive | None = None
    min_chars: Positive = 1
    max_chars: Positive = 4000
    unescape_html: bool = False
    collapse_spaces: bool = False
    flags: bool = False
    rules: Rules = Rules()
    near_duplicates: NearDuplicates | None = None
    size: Positive | None = None
    diversity: Diversity = Diversity()
    unsafe_columns: list[str] = []
    unsafe_threshold: Fraction = 0.5
    unsafe_share: Fraction | None = None
    unsafe_judge: bool = False
    unsafe_prompt: Source = Field("builtin:safety", description="what the judge is asked, with a slot {text}")
    splits: Splits = Splits()
    workers: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Queries:
        if self.size is not None and self.limit is not None:
            raise ValueError("limit takes the first queries and size a diverse subset: give one of them")
        labelled = self.unsafe_columns or self.unsafe_judge
        if self.unsafe_share is not None and (self.size is None or not labelled):
            raise ValueError(
                "unsafe_share needs size, and unsafe_columns or unsafe_judge: a share of how many, by whose "
                "labels"
            )
        if self.min_chars > self.max_chars:
            raise ValueError(f"min_chars {self.min_chars} is over max_chars {self.max_chars}")
        if self.size is None:
            refuse_unused(self, "diversity", "without size")
        if not self.unsafe_columns:
            refuse_unused(self, "unsafe_threshold", "without unsafe_columns")
        if not self.unsafe_judge:
            refuse_unused(self, "unsafe_prompt", "without unsafe_judge")
        return self
