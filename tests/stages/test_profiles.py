"""Profiles: which query has which; their conditions are asked, checked and learnt in the same words."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vpo_ray.engines.chat import Answer, Message, Sampling
from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.loop import opening, phases, policies
from vpo_ray.loop.export import preference_lines
from vpo_ray.loop.ledger import build_ledger
from vpo_ray.prompts.conditions import Conditions, asked_of, conditioned
from vpo_ray.recipe import Judge, Pair, Profile, Recipe, RecipeError, Rl, Sample, Serve, load
from vpo_ray.records import FEEDBACK, GROUP, PAIR, Row, query_id, table
from vpo_ray.serve.app import as_learnt
from vpo_ray.serve.optimiser import Optimiser
from vpo_ray.serve.safety import Gate
from vpo_ray.serve.wishes import Wishes
from vpo_ray.stages.draft import Drafter, draft_row
from vpo_ray.stages.group import group_of_query
from vpo_ray.stages.judge import Judging
from vpo_ray.stages.pair import pairs_of_query
from vpo_ray.stages.profiles import kept_words, profiled, under
from vpo_ray.stages.sample import Sampler, SampleTally, candidates, identity_key
from vpo_ray.storage.sft_data import CHAT_FILE, distinct, draft_rows, sft_rows, write_chat
from vpo_ray.train.examples import tokenise

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
SETTINGS = Sample(k=2, temperature=0.9, max_tokens=100)
PROFILES = {
    "short": Profile(share=0.3, max_words=4),
    "kept": Profile(share=0.2, keep_words=1, avoid=["8k"]),
    "json": Profile(share=0.25, format="json", fields=["subject", "scene"]),
}


class Says:
    """A chat that answers with these texts in turn, and notes what it was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked, self.schemas = list(texts), list[str](), list[Any]()

    async def complete(
        self, messages: Sequence[Message], sampling: Sampling, schema: dict[str, Any] | None = None
    ) -> Answer:
        self.asked.append(messages[-1]["content"])
        self.schemas.append(schema)
        return Answer(self.texts.pop(0), "stop", 1, 1)


def query(text: str) -> Row:
    return {"query_id": query_id(text), "query": text, "unsafe": None}


def queries(number: int = 400) -> list[Row]:
    return [query(f"a golden ball rolls over meadow {i}") for i in range(number)]


def of_profile(name: str, seed: int = 7) -> Row:
    """A query that has this profile."""
    return next(row for row in queries() if profiled(row, PROFILES, seed).get("profile") == name)


def candidate(name: str, **more: Any) -> Row:
    (row, *_) = candidates(of_profile(name), SETTINGS, "policy", 7, PROFILES)
    return {**dict.fromkeys(FEEDBACK.names), **row, **more}


def sampled(name: str, text: str) -> tuple[Row, Says]:
    chat = Says(text)
    return asyncio.run(Sampler(SETTINGS)(candidate(name), chat)), chat


# Which query has which


def test_profiles_have_their_shares_by_id_and_seed() -> None:
    found = Counter(profiled(row, PROFILES, 7).get("profile") for row in queries(4000))
    shares = {name: count / 4000 for name, count in found.items()}
    wanted = {"short": 0.3, "kept": 0.2, "json": 0.25, None: 0.25}
    assert all(abs(shares[name] - share) < 0.03 for name, share in wanted.items()), shares
    turned = dict(reversed(PROFILES.items()))
    assert [profiled(row, turned, 7) for row in queries()] == [profiled(r, PROFILES, 7) for r in queries()]
    assert [profiled(row, PROFILES, 8) for row in queries()] != [profiled(r, PROFILES, 7) for r in queries()]
    assert all(profiled(row, {}, 7) == {} for row in queries(5))
    everything = {"all": Profile(share=1, max_words=9)}
    assert all(profiled(row, everything, 7)["profile"] == "all" for row in queries())


def test_words_that_are_kept_are_the_querys() -> None:
    text = "a Golden ball, rolls over “meadows” 2024 v2.0x"
    assert kept_words(text, 8, 7) == ("Golden", "ball", "rolls", "over", "meadows")
    assert set(kept_words(text, 2, 7)) < set(kept_words(text, 8, 7))
    assert kept_words(text, 2, 7) == kept_words(text, 2, 7)
    assert kept_words(text, 8, 7, "The golden Ball") == ("Golden", "ball")
    assert kept_words("a cat", 3, 7) == kept_words(text, 0, 7) == ()


def test_a_query_without_a_profile_has_the_candidates_of_a_recipe_without_profiles() -> None:
    for row in queries(40):
        alone = list(candidates(row, SETTINGS, "policy", 7))
        beside = list(candidates(row, SETTINGS, "policy", 7, PROFILES))
        assert (beside == alone) == ("profile" not in profiled(row, PROFILES, 7))
        ids = [[candidate["candidate_id"] for candidate in of] for of in (beside, alone)]
        assert (ids[0] == ids[1]) == (beside == alone)


def test_ids_follow_from_what_is_asked() -> None:
    """Not from the profile's name or share."""
    row = of_profile("short")
    renamed = {"brief": Profile(share=1, max_words=4)}
    other = {"short": Profile(share=1, max_words=5)}
    ids = [
        [c["candidate_id"] for c in candidates(row, SETTINGS, "policy", 7, profiles)]
        for profiles in (PROFILES, renamed, other)
    ]
    assert ids[0] == ids[1] != ids[2]


# One wording


class Policy:
    """Notes what the endpoint asks of it."""

    def __init__(self) -> None:
        self.asked, self.fields = list[str](), list[Any]()

    async def answer(self, query: str, fields: Any, request_id: str, image: object = None) -> dict[str, Any]:
        self.asked.append(query)
        self.fields.append(fields)
        return {"choices": [{"message": {"content": '{"scene": "x", "subject": "y"}'}}]}


def test_a_request_is_asked_in_the_words_that_were_sampled_and_learnt(tiny_models: Path) -> None:
    task = "Rewrite: {query}"
    tokenizer = load_tokenizer(str(tiny_models / "policy"), task)
    for name in PROFILES:
        row, chat = sampled(name, "A golden ball.")
        (asked,) = chat.asked
        chosen = {**row, "prompt": "A golden ball rolls.", "candidate_id": "other"}
        (pair,) = _paired([chosen, row])
        (example,), _ = tokenise("dpo", [pair], tokenizer, task, 4096)
        learnt = tokenizer.decode(example.prompt)
        assert asked in learnt
        assert asked != row["query"]
        (line,) = preference_lines([pair], task, "trl")
        assert line["prompt"] == [{"role": "user", "content": f"Rewrite: {asked}"}]
        made = Conditions.stored(row["conditions"])
        wishes = Wishes(made.keep, made.max_words, None, "low", made.avoid, made.language, made.fields)
        policy = Policy()
        settings = Serve(tell_wishes=True)
        optimiser = Optimiser(policy, Gate(settings.safety), None, settings)  # type: ignore[arg-type]
        fields = {"n": 1, "temperature": 0.7, "seed": 5}
        result = asyncio.run(optimiser(row["query"], fields, "id", (), wishes))
        assert set(policy.asked) == {asked}
        assert (policy.fields[0].get("response_format") is not None) == (name == "json")
        if name == "json":
            assert (result.prompt, result.unmet) == ('{"subject": "y", "scene": "x"}', [])


def _paired(rows: list[Row], scores: tuple[float, float] = (2.0, 1.0)) -> list[Row]:
    scored = [
        {**row, "k": k, "score": score, "verdict": "aligned", "answers": [], "dimensions": []}
        for k, (row, score) in enumerate(zip(rows, scores, strict=True))
    ]
    return pairs_of_query(scored, Pair(margin=0.1, dominance="none"), Counter())


def test_pairs_and_groups_say_the_profile() -> None:
    row, _ = sampled("short", "A golden ball.")
    chosen = {**row, "prompt": "A golden ball rolls.", "candidate_id": "other"}
    (pair,) = _paired([chosen, row])
    assert (pair["profile"], pair["conditions"]) == ("short", '{"max_words": 4}')
    assert table([pair], PAIR).num_rows == 1
    scored = [{**row, "score": 1.0}, {**chosen, "k": 1, "score": 2.0}]
    group = group_of_query(scored, Rl(epochs=1, lr=1e-6, global_batch=1), 0.0, Counter(), Counter())
    assert group is not None
    assert (group["profile"], group["conditions"]) == ("short", '{"max_words": 4}')
    assert table([group], GROUP).num_rows == 1


# What is not met


def test_a_candidate_says_what_it_does_not_meet() -> None:
    assert sampled("short", "A golden ball.")[0]["unmet"] == []
    assert sampled("short", "A golden ball rolls on.")[0]["unmet"] == ["max_words: 5"]
    row, chat = sampled("json", '{"scene": "x",  "subject": "y"}')
    assert (row["prompt"], row["unmet"]) == ('{"subject": "y", "scene": "x"}', [])
    assert chat.schemas[0]["required"] == ["subject", "scene"]
    tally = SampleTally()
    for prompt in ("A golden ball.", "A golden ball rolls on."):
        tally.add(sampled("short", prompt)[0])
    tally.add({**dict.fromkeys(FEEDBACK.names), "prompt_tokens": 1})
    assert tally.result()["profiles"] == {"short": {"prompts": 2, "unmet": {"any": 1, "max_words": 1}}}


def judged(name: str, prompt: str, unmet: list[str], *answers: Any, refine: bool = True) -> tuple[Row, Says]:
    chat = Says(*(json.dumps(answer) for answer in answers))
    row = candidate(name, prompt=prompt, unmet=unmet)
    return asyncio.run(Judging(Judge(model="m", refine=refine))(row, chat)), chat


ALIGNED = {"critique": "fine", "missing": [], "added": [], "verdict": "aligned"}


def test_what_is_not_met_is_refused_and_refined_without_asking_for_a_verdict() -> None:
    long = "A golden ball rolls on."
    row, chat = judged("short", long, ["max_words: 5"], {"prompt": "A golden ball."}, ALIGNED)
    assert (row["verdict"], row["critique"]) == ("imprecise", "The prompt does not meet: max_words: 5.")
    assert (row["refined_prompt"], row["refined_verdict"]) == ("A golden ball.", "aligned")
    refine, again = chat.asked
    assert "max_words: 5" in refine
    assert all("- Write at most 4 words." in text for text in (refine, again))
    (pair,) = pairs_of_query([row], Pair(), Counter())
    assert (pair["chosen"], pair["rejected"], pair["profile"]) == ("A golden ball.", long, "short")


def test_a_refined_prompt_has_to_meet_them_too() -> None:
    row, chat = judged("short", "A golden ball rolls on.", ["max_words: 5"], {"prompt": "a b c d e f"})
    assert (row["refined_fault"], len(chat.asked)) == ("unmet: max_words", 1)
    reasons = Counter[str]()
    assert pairs_of_query([row], Pair(), reasons) == []
    assert reasons["refined prompt: unmet: max_words"] == 1


def test_a_judge_that_does_not_refine_gives_no_verdict_on_it() -> None:
    row, chat = judged("short", "A golden ball rolls on.", ["max_words: 5"], refine=False)
    assert (row["verdict"], row["refined_prompt"], chat.asked) == ("imprecise", None, [])


def test_what_meets_a_profile_wins_over_what_does_not() -> None:
    """Without a correction by the judge too; one that it has comes first."""
    best, met, long = (
        candidate("short", candidate_id=name, k=k, prompt=prompt, unmet=unmet, verdict=verdict)
        for k, (name, prompt, unmet, verdict) in enumerate(
            [
                ("a", "A golden ball.", [], "aligned"),
                ("b", "Gold.", [], "imprecise"),
                ("c", "A golden ball rolls on.", ["max_words: 5"], "imprecise"),
            ]
        )
    )
    (pair,) = pairs_of_query([best, met, long], Pair(), Counter())
    assert (pair["chosen"], pair["rejected"], pair["kind"]) == ("A golden ball.", long["prompt"], "text")
    assert (pair["chosen_id"], pair["rejected_id"], pair["profile"]) == ("a", "c", "short")
    assert pairs_of_query([met, long], Pair(), Counter()) == []
    refined = {**long, "refined_prompt": "Gold rolls.", "refined_verdict": "aligned"}
    chosen = [
        pair["chosen"] for pair in pairs_of_query([best, met, refined], Pair(text_per_query=9), Counter())
    ]
    assert chosen == ["Gold rolls.", "A golden ball."]
    bare = [{**row, "unmet": None} for row in (best, met, long)]
    assert pairs_of_query(bare, Pair(), Counter()) == []


def test_a_caption_is_refined_as_one() -> None:
    caption = {"scene": "a meadow", "subject": "a golden ball"}
    row, chat = judged("json", "A ball.", ["format: no"], {"prompt": caption}, ALIGNED)
    assert row["refined_prompt"] == '{"subject": "a golden ball", "scene": "a meadow"}'
    assert row["refined_verdict"] == "aligned"
    asked = chat.schemas[0]["properties"]["prompt"]
    assert asked["required"] == ["subject", "scene"]
    assert asked["properties"]["scene"]["maxLength"] == 1000, "half of judge.prompt_max_chars"


def test_an_aligned_prompt_is_judged_with_its_conditions_in_sight() -> None:
    row, chat = judged("short", "A golden ball.", [], ALIGNED)
    assert row["verdict"] == "aligned"
    assert "- Write at most 4 words." in chat.asked[0]


# SFT data


def test_drafts_have_profiles(tmp_path: Path) -> None:
    found = of_profile("short")
    row = {**draft_row(found, "key", "m", 7, PROFILES)}
    assert (row["profile"], row["conditions"]) == ("short", '{"max_words": 4}')
    assert row["draft_id"] != draft_row(found, "key", "m", 7)["draft_id"]
    recipe = recipe_of(tmp_path)
    examples = [{"query_id": str(i), "query": "q", "prompt": "p"} for i in range(3)]
    chat = Says(*map(json.dumps, [{"prompt": "a b c d e"}, {"prompt": "A golden ball."}, ALIGNED]))
    row = {**dict.fromkeys(phases.RunDir(recipe.out).table("drafts").schema.names), **row}
    assert recipe.draft is not None
    done = asyncio.run(Drafter(recipe.draft, Judge(model="m"), examples)(row, chat))
    assert (done["prompt"], done["target"]) == ("a b c d e", "A golden ball.")
    assert all("- Write at most 4 words." in text for text in chat.asked)
    run = opening.open_run(recipe)
    run.table("drafts").append([done])
    (learnt,) = draft_rows(run)
    assert asked_of(learnt) == conditioned(found["query"], Conditions(max_words=4))
    write_chat(run, [learnt])
    (read,) = sft_rows(run.at(CHAT_FILE), profile="profile")
    assert (read["profile"], read["prompt"]) == ("short", "A golden ball.")


def recipe_of(folder: Path, *more: str) -> Recipe:
    profiles = "profiles={short: {share: 0.5, max_words: 4}, kept: {share: 0.2, keep_words: 1}}"
    examples = "draft={examples: vpo_ray/data/sft.jsonl, llm: {model: m}}"
    return load(TINY, [f"out={folder / 'run'}", profiles, examples, *more])


def sft_recipe(folder: Path, rows: list[dict[str, str]]) -> Recipe:
    data = folder / "sft.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return recipe_of(folder, f"sft.data={data}", "sft.profile_column=kind")


def test_rows_of_sft_data_name_their_profile(tmp_path: Path) -> None:
    plain = {"query": "a cat", "prompt": "A cat."}
    kept = {"query": "golden meadow", "prompt": "A meadow.", "kind": "kept"}
    recipe = sft_recipe(tmp_path, [plain, {**plain, "prompt": "A cat!", "kind": "short"}, kept])
    run = opening.open_run(recipe)
    rows = policies.training_rows(recipe, run)
    told = [Conditions.stored(row.get("conditions")) for row in rows]
    assert told == [Conditions(), Conditions(max_words=4), Conditions(keep=("meadow",))]
    run.table("sft").replace(rows)
    assert sorted(str(row["profile"]) for row in run.table("sft").rows()) == ["None", "kept", "short"]
    identity = policies.policy_id(recipe, run)
    bare = sft_recipe(tmp_path, [plain, {**plain, "prompt": "A cat!"}, {**kept, "kind": ""}])
    assert policies.policy_id(bare, run) != identity


def test_a_prompt_is_learnt_under_each_of_its_profiles(tiny_models: Path, tmp_path: Path) -> None:
    plain = {"query": "a cat", "prompt": "A cat."}
    recipe = sft_recipe(tmp_path, [plain, {**plain, "kind": "short"}, {**plain, "kind": "short"}])
    run = opening.open_run(recipe)
    every = policies.training_rows(recipe, run)
    rows, again = distinct(every)
    assert ([row.get("profile") for row in rows], again) == ([None, "short"], 1)
    run.table("sft").replace(rows)
    assert run.table("sft").count() == len(list(run.table("sft").rows())) == 2
    task = "Rewrite: {query}"
    tokenizer = load_tokenizer(str(tiny_models / "policy"), task)
    examples, dropped = tokenise("sft", every, tokenizer, task, 1024)
    assert (len(examples), dropped) == (2, {"duplicate": 1})
    assert len({example.prompt.tobytes() for example in examples}) == 2


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"kind": "long"}, "row 1 names the profile 'long'; there are short, kept"),
        ({"kind": "short", "prompt": "a b c d e"}, r"row 1 does not meet its profile short \(max_words: 5\)"),
    ],
)
def test_rows_that_are_no_examples_of_their_profile_are_refused(
    tmp_path: Path, row: dict[str, str], says: str
) -> None:
    recipe = sft_recipe(tmp_path, [{"query": "a cat", "prompt": "A cat.", **row}])
    with pytest.raises(policies.LoopError, match=says):
        policies.training_rows(recipe, opening.open_run(recipe))


# The run


def test_a_run_knows_its_candidates_and_counts_their_profiles(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "sft=null")
    run = opening.open_run(recipe)
    identity = policies.policy_id(recipe, run)
    row = next(r for r in queries() if profiled(r, recipe.profiles, recipe.seed).get("profile") == "short")
    (first, *_) = candidates(row, recipe.sample, identity, recipe.seed, recipe.profiles)
    run.table("candidates").append([{**first, "prompt": "a b c d e", "unmet": ["max_words: 5"]}])
    policies.refuse_other_policy(recipe, run, identity)
    assert build_ledger(run, recipe)["stages"]["sample"]["profiles"] == {
        "short": {"prompts": 1, "unmet": {"any": 1, "max_words": 1}}
    }
    key = identity_key(recipe.sample, recipe.seed)
    assert "conditions" not in key
    with pytest.raises(policies.LoopError, match="another policy"):
        policies.refuse_other_policy(recipe, run, "another")


@pytest.mark.parametrize(
    ("profiles", "says"),
    [
        ("{a: {share: 0.6, max_words: 1}, b: {share: 0.5, max_words: 2}}", "shares sum to 1.1"),
        ("{a: {share: 0.6}}", "it asks nothing"),
        ("{a: {share: 0, max_words: 1}}", "greater than 0"),
        ("{a: {share: 1, language: tlh}}", "no language whose script is known"),
        ("{a: {share: 1, max_words: 3, fields: [x]}}", "no effect with format: text"),
        ("{a: {share: 1, format: json, fields: [x, x]}}", "named twice"),
        ("{a: {share: 1, format: json, fields: ['a b']}}", "no name of a field"),
        ("{a: {share: 1, keep: [' ']}}", "write a word"),
        (
            "{a: {share: 0.1, format: json}, b: {share: 0.1, format: json, fields: [x]}}",
            "name different fields",
        ),
    ],
)
def test_profiles_that_ask_nothing_or_too_much_are_refused(profiles: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(TINY, [f"profiles={profiles}"])


def test_profiles_are_in_the_fingerprint_whatever_their_names() -> None:
    plain = load(TINY)
    prints = {
        load(TINY, [f"profiles={{{name}: {{share: 0.5, max_words: {words}}}}}"]).fingerprint()
        for name in ("short", "workers")
        for words in (3, 4)
    }
    assert len(prints | {plain.fingerprint()}) == 5
    with pytest.raises(RecipeError, match="no effect without profiles"):
        load(TINY, ["sft.data=vpo_ray/data/sft.jsonl", "sft.profile_column=x"])


# The endpoint


def test_the_endpoint_tells_a_policy_that_learnt_profiles(tmp_path: Path) -> None:
    learnt, plain = tmp_path / "learnt", tmp_path / "plain"
    dumped = {name: profile.model_dump(mode="json") for name, profile in PROFILES.items()}
    for folder, facts in ((learnt, {"job": "x", "profiles": dumped}), (plain, {"job": "y"})):
        folder.mkdir()
        (folder / "vpo.json").write_text(json.dumps(facts), "utf-8")

    def told(folder: Path, **more: Any) -> tuple[bool | None, list[str] | None]:
        found = as_learnt(str(folder), Serve.model_validate(more))
        return found.tell_wishes, found.caption_fields

    fields = ["subject", "scene"]
    assert told(learnt) == (True, fields)
    assert told(plain) == (False, None)
    assert told(tmp_path / "none") == (False, None)
    assert told(plain, tell_wishes=True) == (True, None)
    assert told(learnt, tell_wishes=False, caption_fields=["x"]) == (False, ["x"])
    assert told(learnt, canary={"checkpoint": str(plain), "share": 0.5}) == (False, fields)
    assert told(learnt, canary={"checkpoint": str(learnt), "share": 0.5}) == (True, fields)


def test_a_profile_of_a_query_without_words_to_keep_asks_nothing() -> None:
    assert under("kept", "a cat", {"kept": Profile(share=1, keep_words=2)}, 7)["conditions"] is None
