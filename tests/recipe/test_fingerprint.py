"""What changes a result is in the fingerprint, in ids, or refused beside other results; the rest is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from vpo_ray.loop import opening, phases, policies
from vpo_ray.loop.curation import curate_run
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import OPERATIONAL, Recipe, Section, differences, load
from vpo_ray.recipe.result_keys import FREE
from vpo_ray.records import candidate_id
from vpo_ray.stages import facts, made_with
from vpo_ray.stages.draft import draft_key
from vpo_ray.stages.made_with import OtherInputsError, refuse_other_inputs
from vpo_ray.stages.sample import candidates
from vpo_ray.storage.run_dir import RunDir

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "jobs/recipes/tiny.yaml")
HERE = "http://here/v1"
QUERY = {"query_id": "q", "query": "a cat", "unsafe": None}

CHANGES = [
    "engine_kwargs.quantization=fp8",
    "engine_kwargs.kv_cache_dtype=fp8",
    "engine_kwargs.max_model_len=512",
    "engine_kwargs.dtype=float16",
    "engine_kwargs.revision=main",
    "engine_kwargs.tokenizer=other/tokenizer",
    "engine_kwargs.hf_overrides={rope_scaling: {factor: 2.0}}",
    "engine_kwargs.speculative_config={method: ngram}",
    "engine_kwargs.attention_backend=FLASHINFER",
    "engine_kwargs.default_chat_template_kwargs={enable_thinking: false}",
    "engine_kwargs.an_argument_of_a_later_version=1",
    "env.VLLM_ATTENTION_BACKEND=FLASHINFER",
    "env.VLLM_USE_FLASHINFER_SAMPLER='1'",
    "env.VLLM_BATCH_INVARIANT='1'",
]
RUNS = [
    "engine_kwargs.tensor_parallel_size=2",
    "engine_kwargs.pipeline_parallel_size=2",
    "engine_kwargs.gpu_memory_utilization=0.5",
    "engine_kwargs.swap_space=4",
    "engine_kwargs.enforce_eager=false",
    "engine_kwargs.max_num_seqs=8",
    "engine_kwargs.max_num_batched_tokens=4096",
    "engine_kwargs.enable_prefix_caching=false",
    "engine_kwargs.quantization=null",
    "engine_kwargs.hf_overrides={}",
    "env.VLLM_LOGGING_LEVEL=DEBUG",
    "env.NCCL_DEBUG=INFO",
    "env.HF_HOME=/models",
    "env.VLLM_CPU_KVCACHE_SPACE='8'",
]
ENGINES = ["sample.engine", "judge.engine", "draft.llm.engine"]
DRAFT = "draft={examples: vpo_ray/data/sft.jsonl, llm: {model: m}}"


def of_tiny(*more: str) -> Recipe:
    return load(TINY, [DRAFT, *more])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", CHANGES)
def test_an_engines_arguments_that_change_its_text_are_computing(engine: str, change: str) -> None:
    plain, other = of_tiny(), of_tiny(f"{engine}.{change}")
    assert other.fingerprint() != plain.fingerprint()
    assert [line for line in differences(plain.dump(), other.dump()) if line.startswith(engine)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", RUNS)
def test_an_engines_arguments_that_only_say_how_it_runs_are_not(engine: str, change: str) -> None:
    plain, other = of_tiny(), of_tiny(f"{engine}.{change}")
    assert other.fingerprint() == plain.fingerprint()
    assert differences(plain.dump(), other.dump()) == []


def ids(recipe: Recipe) -> list[str]:
    return [row["candidate_id"] for row in candidates(QUERY, recipe.sample, "policy", recipe.seed)]


def test_ids_of_candidates_and_drafts_follow_the_engine_and_are_as_before_without(tmp_path: Path) -> None:
    plain = of_tiny()
    key = {"temperature": 0.9, "top_p": 0.9, "top_k": -1, "max_tokens": 80, "seed": 7}
    assert ids(plain) == [candidate_id("q", k, "policy", key) for k in range(4)]
    assert ids(of_tiny("sample.engine.engine_kwargs.gpu_memory_utilization=0.5")) == ids(plain)
    quantised = of_tiny("sample.engine.engine_kwargs.quantization=fp8")
    assert not set(ids(quantised)) & set(ids(plain))

    def drafts(recipe: Recipe) -> str:
        assert recipe.draft is not None
        return draft_key(recipe.draft, recipe.judge, [])

    assert drafts(of_tiny("draft.llm.engine.engine_kwargs.quantization=fp8")) != drafts(plain)
    assert drafts(of_tiny("draft.llm.engine.max_num_seqs=3")) == drafts(plain)


def test_keys_of_others_are_theirs_whatever_ours_are_called() -> None:
    """`device` of a request or a dimension is no pool's."""
    judge = "judge.backend=openai", "judge.endpoint={base_url: 'http://127.0.0.1/v1'}"
    checklist = "reward.checklist.file=null", "reward.checklist.questions=q.txt", "reward.checklist.weights=w"
    for plain, change in (
        (judge, "judge.endpoint.request={store: true, retries: 1}"),
        ((), "render.call_options={batch_size: 2}"),
        ((), "render.scheduler_options={offload: 1}"),
        (checklist, "reward.checklist.dimensions={device: 1-4}"),
    ):
        assert of_tiny(*plain, change).fingerprint() != of_tiny(*plain).fingerprint(), change


def test_a_video_service_is_its_model_and_request_wherever_it_is() -> None:
    def of(*more: str) -> str:
        service = (
            f"render={{kind: openai, model: m, endpoint: {{base_url: '{HERE}', request: {{seconds: 4}}}}}}"
        )
        return of_tiny(service, *more).fingerprint()

    for same in ("base_url=http://elsewhere/v1", "form=false", "second_price=1", "requests_per_minute=5"):
        assert of(f"render.endpoint.{same}") == of(), same
    for other in ("endpoint.request.seconds=5", "endpoint.request.steps=5", "version=2", "model=n"):
        assert of(f"render.{other}") != of(), other
    judge = "judge={model: m, backend: openai, endpoint: {base_url: %s}}"
    assert of(judge % HERE) != of(judge % "http://elsewhere/v1"), "its name may be any model's"


def test_every_mapping_of_free_keys_is_known() -> None:
    """One that is added is computing, operational, or looked into; it cannot be forgotten."""
    found: set[str] = set()
    todo: list[type[Section]] = [Recipe]
    while todo:
        for name, field in todo.pop().model_fields.items():
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            todo += [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
            if any(getattr(kind, "__origin__", None) is dict for kind in kinds):
                found.add(name)
    # deepspeed: its `device` and `offload` say how it runs, too; resources are a pool's.
    of_evaluation = {"policies", "sets", "rewards", "transfer"}  # operational as a whole
    assert found <= FREE | OPERATIONAL | {"deepspeed", "more_rewards", "resources"} | of_evaluation


# What the recipe names


def judged(recipe: Recipe, run: RunDir, **more: Any) -> None:
    row = {"candidate_id": "c", "query_id": "q", "query": "a cat", "k": 0, "seed": 1, "prompt": "x",
           "verdict": "aligned", "seconds": {"judge": 0.5}, **more}  # fmt: skip
    run.table("verdicts").replace([row])


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge/config.json").write_text("{}", "utf-8")
    (tmp_path / "judge/README.md").write_text("a model", "utf-8")
    (tmp_path / "critique.txt").write_text("Judge {query} and {prompt}", "utf-8")
    (tmp_path / "checklist.yaml").write_text("questions: []", "utf-8")
    sets = {"out": "run", "judge.model": "judge", "judge.critique_prompt": "critique.txt",
            "reward.checklist.file": "checklist.yaml"}  # fmt: skip
    return load(TINY, [f"{key}={tmp_path / value}" for key, value in sets.items()])


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("critique.txt", "Judge {query} or {prompt}", "judge.critique_prompt: content"),
        ("judge/config.json", '{"a": 1}', "judge.model: content"),
    ],
)
def test_another_file_under_the_same_name_adds_no_rows_to_a_table(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, says: str
) -> None:
    run = RunDir(recipe.out)
    refuse_other_inputs(recipe, run, ["judge"])
    judged(recipe, run)
    (tmp_path / "judge/README.md").write_text("a fine model", "utf-8")
    refuse_other_inputs(recipe, run, ["judge"])
    read_prompt.cache_clear()
    (tmp_path / file).write_text(text, "utf-8")
    with pytest.raises(OtherInputsError, match=says):
        refuse_other_inputs(recipe, run, ["judge"])
    read_prompt.cache_clear()


def test_a_table_without_a_good_row_takes_what_is_there_now(recipe: Recipe, tmp_path: Path) -> None:
    """The cause of errors was mended in the file, and they are tried again."""
    run = RunDir(recipe.out)
    refuse_other_inputs(recipe, run, ["judge"])
    judged(recipe, run, error="JudgeError: no verdict", error_stage="judge")
    read_prompt.cache_clear()
    (tmp_path / "critique.txt").write_text("Judge {query} better, and {prompt}", "utf-8")
    refuse_other_inputs(recipe, run, ["judge"])
    judged(recipe, run)
    refuse_other_inputs(recipe, run, ["judge"])
    read_prompt.cache_clear()


def test_another_engine_adds_no_rows_to_a_table(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(recipe.out)
    monkeypatch.setattr(facts, "short_version", lambda name: "0.28" if name == "vllm" else None)
    refuse_other_inputs(recipe, run, ["judge"])
    judged(recipe, run)
    monkeypatch.setattr(facts, "short_version", lambda name: "0.29" if name == "vllm" else None)
    with pytest.raises(
        OtherInputsError, match=r"verdicts was made with other .*\n  vllm: 0.28 -> 0.29\n.* delete (.*)"
    ) as said:
        refuse_other_inputs(recipe, run, ["judge"])
    monkeypatch.setattr(facts, "short_version", lambda name: None)  # a driver without engines
    refuse_other_inputs(recipe, run, ["judge"])
    monkeypatch.setattr(facts, "short_version", lambda name: "0.29" if name == "vllm" else None)
    Path(str(said.value).rpartition("delete ")[2]).unlink()
    refuse_other_inputs(recipe, run, ["judge"])


def test_the_checklist_is_what_scores_were_made_with(recipe: Recipe, tmp_path: Path) -> None:
    before = made_with.facts(recipe, "score")
    (tmp_path / "checklist.yaml").write_text("questions: [{question: Is it a cat?}]", "utf-8")
    after = made_with.facts(recipe, "score")
    assert {key for key in before if before[key] != after[key]} == {"reward.checklist.file"}


def test_a_run_of_a_version_that_did_not_note_it_goes_on(recipe: Recipe) -> None:
    run = RunDir(recipe.out)
    judged(recipe, run)
    refuse_other_inputs(recipe, run, ["judge"])
    assert "judge.critique_prompt" in run.read_json("made_with/judge.json")


def test_an_interrupted_curation_of_other_input_leaves_no_query(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("a cat\na dog\n", "utf-8")
    recipe = load(TINY, [f"out={tmp_path / 'run'}", f"queries.path={tmp_path / 'q.txt'}"])
    run = RunDir(recipe.out)
    left = {"query_id": "x", "query": "of the old file", "source": "q.txt", "split": "dpo"}
    run.table("queries").append([left])
    curate_run(recipe, run)
    assert {row["query"] for row in run.table("queries").rows()} == {"a cat", "a dog"}


@pytest.mark.parametrize("words", ["null", "words.txt", "file:words.txt"])
def test_input_that_changes_after_curation_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, words: str
) -> None:
    (tmp_path / "q.txt").write_text("a cat\na dog\n", "utf-8")
    (tmp_path / "words.txt").write_text("cow bell\n", "utf-8")
    words = words.replace("file:", "file://").replace("words.txt", f"{tmp_path}/words.txt")
    sets = [f"out={tmp_path / 'run'}", f"queries.path={tmp_path / 'q.txt'}"]
    recipe = load(TINY, [*sets, f"queries.rules.keywords={words}"])
    run = opening.open_run(recipe)
    for _ in range(2):
        phases.curate_queries(recipe, run)
    assert "changed since" not in caplog.text
    (tmp_path / "q.txt").write_text(json.dumps("a cow") + "\n", "utf-8")
    phases.curate_queries(recipe, run)
    assert f"{tmp_path / 'q.txt'} changed since the run's queries were curated" in caplog.text
    assert run.table("queries").count() == 2


def test_a_run_that_sampled_with_arguments_that_did_not_count_is_refused(tmp_path: Path) -> None:
    sets = [f"out={tmp_path / 'run'}", "sft=null"]
    recipe = load(TINY, [*sets, "sample.engine.engine_kwargs.quantization=fp8"])
    run = RunDir(recipe.out)
    identity = policies.policy_id(recipe, run)
    run.table("candidates").append(list(candidates(QUERY, load(TINY, sets).sample, identity, recipe.seed)))
    with pytest.raises(policies.LoopError, match="did not look at engine_kwargs"):
        phases.generate_feedback(recipe, run, policies.Start("policy", identity))
