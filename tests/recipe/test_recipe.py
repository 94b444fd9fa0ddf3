"""A recipe is read strictly, and its errors say what to do."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_recipe import tree

from vpo_ray.recipe import (
    Engine,
    RecipeError,
    load,
    load_serve,
    locate,
    parse,
    parse_stored,
    video_presets,
)

TINY = Path(__file__).parents[2] / "jobs/recipes/tiny.yaml"


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"more_rewards": {"a b": "REWARD"}}, "more_rewards.a b: choose another name"),
        ({"more_rewards": {"pool": "REWARD"}}, "more_rewards.pool: choose another name"),
        ({"more_rewards": {"vlm": {"batch_size": 2}}}, "more_rewards.vlm: batch_size cannot be set"),
        ({"pair": {"reward": "vlm"}}, "no 'vlm' in more_rewards (there is none)"),
    ],
)
def test_further_rewards_have_names_and_no_pool(more: dict[str, Any], says: str) -> None:
    reward = tree()["reward"]
    for name, keys in more.get("more_rewards", {}).items():
        more["more_rewards"][name] = reward if keys == "REWARD" else {**reward, **keys}
    with pytest.raises(RecipeError, match=re.escape(says)):
        parse(tree(**more), "here")


def test_the_smallest_recipe_needs_no_training() -> None:
    recipe = parse(tree(), "here")
    assert recipe.sft is None
    assert recipe.dpo is None
    assert recipe.pair.margin == 0.5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b\n", "this is list"),
        ("", "this is an empty file"),
        ("a: [1\n", "not a YAML file"),
        (b"\x00\x01", "not a YAML file"),
        (b"name: \xff\n", "not a YAML file"),
        ("name: !!python/object/apply:os.system ['touch pwned']\n", "could not determine a constructor"),
        ("name: a\nout: b\nname: c\n", "`name` is given twice"),
        ("pair: {margin: 1, margin: 2}\n", "`margin` is given twice"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str | bytes, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert not Path("pwned").exists()


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="Is a directory"):
        load(tmp_path)


def test_every_problem_is_told_at_once() -> None:
    bad = tree(sample={"k": 0, "temprature": 1.0, "max_tokens": "many"})
    with pytest.raises(RecipeError) as caught:
        parse(bad, "my.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "my.yaml: 4 problems"
    assert sorted(line.split(":")[0].strip() for line in lines[1:]) == [
        "sample.k",
        "sample.max_tokens",
        "sample.temperature",
        "sample.temprature",
    ]


def test_an_unknown_key_comes_with_the_nearest_known_one() -> None:
    with pytest.raises(RecipeError, match="did you mean `guidance`"):
        parse(tree(render={"model": "m", "guidence": 3}), "x")
    with pytest.raises(RecipeError, match="did you mean `max_num_seqs`"):
        parse(tree(judge={"model": "m", "engine": {"max_num_seq": 3}}), "x")
    with pytest.raises(RecipeError, match=r"sample\.pool\.zzz: unknown key; known here: size, num_cpus"):
        parse(tree(sample={"k": 1, "temperature": 1, "max_tokens": 1, "pool": {"zzz": 1}}), "x")


def test_a_missing_key_says_how_to_give_it() -> None:
    bad = tree()
    del bad["render"]
    with pytest.raises(RecipeError, match=r"render: missing; .* --set render="):
        parse(bad, "x")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("sample.k=[1]", "sample.k"),
        ("sample.k=2.5", "sample.k"),
        ("sample.temperature=2.1", "sample.temperature"),
        ("sample=3", "sample"),
        ("judge.engine.dtype=int4", "judge.engine.dtype"),
        ("dpo.lr=.inf", "dpo.lr"),
        ("dpo.lr=.nan", "dpo.lr"),
        ("pair.margin=.inf", "pair.margin"),
        ("render.preset=none-such", "render"),
        ("render.preset=[cogvideox-2b]", "render.preset"),
        ("reward.yes_tokens=[yes]", "reward.yes_tokens"),
        ("sample.pool.size=[3, 1]", "sample.pool"),
        ("queries.splits={sft: 0, dpo: 0, eval: 0}", "queries.splits"),
        ("reward.checklist.questions=q.txt", "reward.checklist"),
        ("sft.data=null", "recipe: sft.data is missing"),
    ],
)
def test_a_value_that_cannot_be_is_named(override: str, key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(TINY, [override])
    assert f"  {key}" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sft.loss=sigmoid", "sft.loss: a key of dpo; sft has no such thing"),
        ("sft.beta=0.1", "sft.beta: a key of dpo"),
        ("sft.guard={chosen_drop: 1}", "sft.guard: a key of dpo"),
        ("dpo.data=x.jsonl", "dpo.data: a key of sft; dpo has no such thing"),
        ("sft.evaluate={share: 0.1, metric: accuracy}", "sft.evaluate.metric: Input should be 'loss'"),
        ("sft.evaluate={share: 0.1, metric: margin, patience: 2}", "sft.evaluate.metric: "),
        ("dpo.evaluate={steps: 5}", "dpo.evaluate: steps has no effect without held-out rows"),
        ("dpo={epochs: 1, lr: 1.0, global_batch: 1, loss: ipo, label_smoothing: 0.1, length_normalise: true}",
         "dpo: label_smoothing and length_normalise have no effect with loss: ipo"),
        (
            "evaluate={judge: {model: m, refine_prompt: mine.txt, word_limit: 90}}",
            "evaluate: refine_prompt and word_limit have no effect in evaluate.judge",
        ),
        (
            "serve.videos={store: v, refine: {judge: {model: m, refine_prompt: mine.txt}}}",
            "serve.videos.refine: refine_prompt has no effect in serve.videos.refine",
        ),
        (
            "judge={model: m, backend: openai, endpoint: {base_url: 'https://a/v1/chat/completions?x=1'}}",
            "judge.endpoint.base_url: leave /chat/completions out",
        ),
        (
            "judge={model: m, backend: openai, endpoint: {base_url: 'https://me:secret@a/v1'}}",
            "judge.endpoint.base_url: it has a user or password: name a variable",
        ),
        ("dpo.keep_checkpoints=5", "dpo: keep_checkpoints has no effect without save_steps"),
        ("dpo.track={project: mine}", "dpo.track: project has no effect without mlflow or wandb"),
        ("sft.offload={optimizer: cpu, nvme_path: /n}", "sft.offload: nvme_path has no effect without nvme"),
        ("queries.diversity={method: self_bleu}", "queries: diversity has no effect without size"),
        ("queries.diversity.bleu_order=3", "queries.diversity: bleu_order has no effect with method"),
        ("queries.unsafe_threshold=0.9", "queries: unsafe_threshold has no effect without unsafe_columns"),
        ("queries.unsafe_prompt=my.txt", "queries: unsafe_prompt has no effect without unsafe_judge"),
        ("queries.rules.language_confidence=0.9", "queries.rules: language_confidence has no effect without"),
        ("judge.endpoint.retries=9", "judge: endpoint has no effect with backend: vllm"),
        ("judge={model: m, backend: openai, revision: r}", "judge: revision has no effect with backend"),
        ("reward.endpoint.retries=9", "reward: endpoint has no effect with kind: visionreward"),
        ("reward={model: m, kind: openai, template: vqa, checklist: {file: c}}", "template has no effect"),
        ("reward.checklist.dimensions={a: '1'}", "reward.checklist: dimensions has no effect with `file`"),
        ("limits.max_cost=5", "limits.max_cost has no effect: no endpoint"),
        ("serve.autoscaling.upscale_delay_s=5", "serve: autoscaling has no effect"),
        ("serve.safety.keywords=words.txt", "serve.safety: keywords has no effect while"),
        ("serve.safety={query: refuse, keywords: w.txt, on_error: pass}", "on_error has no effect without"),
        ("serve.best_of={rerank: {model: m}, judge_prompt: p.txt}", "judge_prompt has no effect without"),
    ],
)  # fmt: skip
def test_a_key_that_would_do_nothing_is_refused_by_name(override: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(TINY, [override])
    assert says in str(caught.value)


def test_a_limit_of_cost_holds_for_services_that_an_evaluation_asks() -> None:
    service = {"kind": "openai", "model": "m", "endpoint": {"video_price": 0.5}}
    evaluated = {"policies": ["query"], "transfer": {"other": service}}
    given = tree(evaluate=evaluated, limits={"max_cost": 5})
    assert parse(given, "x").limits.max_cost == 5
    service["strategy"] = "adaptive"
    with pytest.raises(RecipeError, match="strategy has no effect in transfer"):
        parse(given, "x")


def test_a_run_of_an_earlier_version_goes_on() -> None:
    """It stored the keys of both phases in each."""
    stored = load(TINY).dump()
    stored["sft"] |= {"beta": 0.1, "loss": "sigmoid", "guard": {}, "reference": "updated"}
    stored["dpo"] |= {"data": None}
    assert parse_stored(stored, "stored") == load(TINY)
    with pytest.raises(RecipeError, match="sft"):
        parse(stored, "stored")


def test_the_stored_recipe_names_what_a_section_cannot_have_of_its_own() -> None:
    recipe = parse(tree(more_rewards={"vlm": tree()["reward"]}, pair={"reward": "vlm"}), "x")
    assert parse(recipe.dump(), "stored") == recipe


@pytest.mark.parametrize(
    ("name", "whole", "sft", "dpo"),
    [
        ("tiny", "ce433d307970de43", "5e02fef967f61484", "fcaa115280dd6ab3"),
        ("vpo_cogvideox_2b", "8f0529c56e0039df", "e4ffe56644bf1330", "75e4d68e29cfee3a"),
        ("vpo_cogvideox_5b", "ab074fd442e6624f", "e4ffe56644bf1330", "75e4d68e29cfee3a"),
    ],
)
def test_fingerprints_of_shipped_recipes_stay(name: str, whole: str, sft: str, dpo: str) -> None:
    recipe = load(TINY.with_name(f"{name}.yaml"))
    assert (recipe.fingerprint(), recipe.fingerprint("sft"), recipe.fingerprint("dpo")) == (whole, sft, dpo)


def test_a_learning_rate_as_yaml_1_1_reads_it() -> None:
    """`5e-7` has no dot, so YAML makes it a string."""
    recipe = load(TINY, ["dpo.lr=5e-7"])
    assert recipe.dpo is not None
    assert recipe.dpo.lr == 5e-7


def test_a_recipe_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse(tree(), "here").sample.k = 3


def test_preset_fills_only_what_is_not_given() -> None:
    recipe = parse(tree(render={"preset": "cogvideox-5b", "steps": 7}), "x")
    assert recipe.render.steps == 7
    assert recipe.render.scheduler == "CogVideoXDPMScheduler"
    assert recipe.render.model == video_presets()["cogvideox-5b"]["settings"]["model"]


def test_no_heavy_import() -> None:
    """`vpo plan` answers in milliseconds, and where neither torch nor Ray is installed."""
    code = (
        "import sys, vpo_ray.recipe, vpo_ray.records, vpo_ray.cli.main\n"
        "sys.modules['vpo_ray.cli.main']._parser()\n"
        "sys.exit(', '.join({'torch', 'ray', 'transformers', 'diffusers', 'vllm'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr


def test_forms() -> None:
    recipe = load(
        TINY,
        [
            "render.steps=30",
            "queries.path=[a.txt, 'b c.csv']",
            "sft=null",
            "judge.pool.size=[1, 4]",
            "sample.pool={num_gpus: 1}",
            "name='a=b: c'",
            "sample.engine.engine_kwargs.a.b=1",
        ],
    )
    assert recipe.render.steps == 30
    assert recipe.queries.path == ["a.txt", "b c.csv"]
    assert recipe.sft is None
    assert recipe.judge.pool.size == (1, 4)
    assert recipe.sample.pool.num_gpus == 1
    assert recipe.name == "a=b: c"
    assert recipe.sample.engine.engine_kwargs["a"] == {"b": 1}


def test_the_last_one_counts() -> None:
    assert load(TINY, ["seed=1", "seed=2"]).seed == 2


def test_a_section_that_was_not_there_is_made(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(tree()))
    recipe = load(path, ["dpo.epochs=1", "dpo.lr=1.0e-6", "dpo.global_batch=4", "limits.tries=3"])
    assert recipe.dpo is not None
    assert recipe.limits.tries == 3


def test_an_anchor_shared_by_two_sections_is_changed_in_one() -> None:
    """tiny.yaml gives sample, judge and serve one engine by a YAML anchor."""
    before, after = load(TINY), load(TINY, ["sample.engine.max_num_seqs=3"])
    assert after.sample.engine.max_num_seqs == 3
    assert (after.judge.engine, after.serve.engine) == (before.judge.engine, before.serve.engine)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("steps", "write it as key.path=value"),
        ("=3", "write it as key.path=value"),
        ("sample.k=[", "the value is not YAML"),
        ("sample.k=!!python/name:os.system", "the value is not YAML"),
        ("seed.x=3", "seed is a value, not a section"),
        ("queries.path.0=a", "queries.path is a value, not a section"),
        ("a..b=3", "a: unknown key"),
        ("serve=", "serve: "),
    ],
)
def test_one_that_cannot_be(override: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(TINY, [override])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("engine", "apart"),
    [
        ({"env": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}}, False),
        ({"env": {"VLLM_CPU_OMP_THREADS_BIND": "0-7"}}, True),
        ({"env": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, "tensor_parallel_size": 2}, True),
        (
            {
                "env": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
                "engine_kwargs": {"pipeline_parallel_size": 2},
            },
            True,
        ),
        ({}, True),
    ],
)
def test_a_process_is_saved_only_where_no_thread_is_bound(engine: dict[str, Any], apart: bool) -> None:
    assert (Engine.model_validate(engine).executor() == {}) == apart


def test_serve_alone() -> None:
    assert load_serve(None, ["serve.port=9000"]).port == 9000
    assert load_serve(str(TINY), ["serve.port=9000"]) == load(TINY, ["serve.port=9000"]).serve
    with pytest.raises(RecipeError, match=r"serve\.port"):
        load_serve(None, ["serve.port=-1"])


def test_locate_leaves_ids_and_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    assert locate("model") == str(tmp_path / "model")
    assert locate("org/model") == "org/model"
    assert locate("s3://bucket/model") == "s3://bucket/model"


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("serve.safety.query", "off"),
        ("serve.log_queries", "no"),
        ("serve.log_queries", "yes"),
        ("sft.autocast", "off"),
        ("profiles.norsk.language", "no"),
    ],
)
def test_words_that_yaml_takes_for_true_or_false_are_words(key: str, word: str) -> None:
    recipe: Any = load(TINY, ["profiles={norsk: {share: 0.5, max_words: 9}}", f"{key}={word}"])
    for part in key.split("."):
        recipe = recipe[part] if isinstance(recipe, dict) else getattr(recipe, part)
    assert recipe == word
    assert load(TINY, ["queries.rules.languages=[no, en]"]).queries.rules.languages == ["no", "en"]
