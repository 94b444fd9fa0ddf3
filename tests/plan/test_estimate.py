"""What a recipe will take: figures with their sources, and clusters on which it cannot run."""

import json
from pathlib import Path
from typing import Any

import pytest
from plan_recipes import ROOT, recipe

from vpo_ray import cli
from vpo_ray.plan import PlanError, plan, show
from vpo_ray.plan.cluster import Cluster, NodeSize, described
from vpo_ray.recipe import video_presets
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.videos import VideoStore, key_parts

GPU_POOLS = {f"{name}__pool__num_gpus": 1 for name in ("sample", "judge", "render", "reward", "serve")}
GPU_TRAINING = {
    f"{phase}__{key}": value
    for phase in ("sft", "dpo")
    for key, value in {"use_gpu": "true", "workers": 4, "resources_per_worker": "{}"}.items()
}


def real(tiny: dict[str, Any], **changes: Any) -> Any:
    """The tiny recipe as if it were of real size: a GPU for everything, CogVideoX-5B to render."""
    preset = video_presets()["cogvideox-5b"]["settings"]
    render = {f"render__{k}": v for k, v in preset.items() if not isinstance(v, dict)}
    render |= {"render__scheduler_options": "{}", "render__call_options": "{}"}
    return recipe(tiny, **{**GPU_POOLS, **GPU_TRAINING, **render, **changes})


def ledger(folder: Path, **seconds: float | None) -> Path:
    """A past run: half of the candidates aligned, 30 pairs of 40 queries."""
    stages: dict[str, Any] = {name: {"seconds_per_row": value} for name, value in seconds.items()}
    stages["judge"] = {**stages.get("judge", {}), "out": 160, "verdicts": {"aligned": 80, "unsafe": 80}}
    stages["pair"] = {"in": 40, "pairs": 30}
    RunDir(folder).write_json("ledger.json", {"stages": stages})
    return folder


def stage(made: Any, name: str) -> Any:
    return next(s for s in made.phases if s.name == name)


def test_what_is_not_known_is_said_to_be(tiny: dict[str, Any]) -> None:
    made = plan(recipe(tiny, sample__k=3, render__steps=7, render__frames=9, dpo__lr="1.0e-4"))
    text = show.text(made)
    assert "102 rows read, 2 dropped, 100 for feedback, 3 candidates each" in text
    lines = {line.split()[0]: line for line in text.splitlines() if line[:1].isalpha()}
    for name in ("sample", "judge", "render", "score"):
        assert " 300 " in lines[name]
        assert stage(made, name).work is None
    assert "up to 300 of 9 x 96 x 64, 7 steps" in lines["videos"]
    assert "size not known before some are rendered" in lines["videos"]
    assert "wall time   not known" in text
    assert "ZeRO-3" in lines["sft"]
    assert "lr 0.0001" in lines["dpo"]
    assert "give --ledger PROBE" in text
    assert made.recipe.fingerprint() in lines["recipe"]


@pytest.mark.parametrize(("limit", "expected"), [(10, 10), (1000, 100)])
def test_a_limit_counts(tiny: dict[str, Any], limit: int, expected: int) -> None:
    assert plan(recipe(tiny, queries__limit=limit)).queries["dpo"] == expected


def test_only_the_dpo_split_is_rendered(tiny: dict[str, Any]) -> None:
    assert stage(plan(recipe(tiny, queries__splits="{dpo: 0, eval: 1}")), "render").rows == 0


def test_rows_that_are_no_text_do_not_stop_it(tiny: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(["fine", "half \ud800", None, 3, {"other": 1}]), "utf-8")
    assert "5 rows read, 4 dropped, 1 for feedback" in show.text(plan(recipe(tiny, queries__path=path)))


def test_the_runs_own_ledger_predicts_the_rest_of_it(tiny: dict[str, Any], tmp_path: Path) -> None:
    ledger(tmp_path / "run", render=90.0, score=None)
    made = plan(recipe(tiny, sample__k=4, render__pool__size="[1, 4]"))
    render = stage(made, "render")
    # 100 queries x 4 candidates, half of them aligned, x 90 s = 5 replica-hours; 1.25 on four.
    assert (render.rows, render.work, render.hours(4)) == (200, 5.0, 1.25)
    assert stage(made, "score").rows == 200
    assert stage(made, "dpo").rows == 75
    assert stage(made, "sft").rows == len(
        Path(ROOT / "vpo_ray/data/sft.jsonl").read_text("utf-8").splitlines()
    )
    assert stage(made, "score").work is None
    assert f"measured, {tmp_path}/run/ledger.json" in show.text(made)


def test_a_ledger_of_another_run(tiny: dict[str, Any], tmp_path: Path) -> None:
    past = ledger(tmp_path / "past", sample=0.5, judge=1.0, render=90.0, score=2.0)
    asked = recipe(tiny)
    for given in (past, past / "ledger.json"):
        made = plan(asked, ledger=str(given))
        assert [s.seconds.value for s in made.stages] == [0.5, 1.0, 90.0, 2.0]
    then = recipe(tiny, out=past, render__steps=99, dpo__workers=3)
    RunDir(past).write("recipe.yaml", json.dumps(then.dump()).encode())
    render, score = (stage(plan(asked, ledger=str(past)), name) for name in ("render", "score"))
    assert "with other settings then: render.steps: 99 -> " in render.seconds.source
    assert "other settings" not in score.seconds.source


def test_training_is_measured_by_the_clock_with_all_workers(tiny: dict[str, Any], tmp_path: Path) -> None:
    past = ledger(tmp_path / "past", dpo=2.0)
    asked = real(tiny)
    assert stage(plan(asked, ledger=str(past)), "dpo").work is None, "nobody knows how many workers it had"
    RunDir(past).write("recipe.yaml", json.dumps(real(tiny, out=past, dpo__workers=2).dump()).encode())
    dpo = stage(plan(asked, ledger=str(past)), "dpo")
    # 75 pairs x 2 s with 2 workers = 300 worker-seconds, of 4 workers now.
    assert dpo.gpu_hours == pytest.approx(300 / 3600)
    assert dpo.hours(4) == pytest.approx(75 / 3600)


@pytest.mark.parametrize("given", ["none", "none.json", "bad"])
def test_a_ledger_that_is_none(tiny: dict[str, Any], tmp_path: Path, given: str) -> None:
    RunDir(tmp_path / "bad").write("ledger.json", b"[]")
    with pytest.raises(PlanError, match=r"--ledger .*no ledger\.json of a run"):
        plan(recipe(tiny), ledger=str(tmp_path / given))


def test_the_published_time_of_a_preset_and_where_it_ends(tiny: dict[str, Any]) -> None:
    eight = described(8, "H100")
    render = stage(plan(real(tiny), eight), "render")
    assert render.seconds.value == video_presets()["cogvideox-5b"]["seconds"]["H100"]
    assert "https://huggingface.co/zai-org/CogVideoX-5b" in render.seconds.source
    half = stage(plan(real(tiny, render__steps=25, render__compile="true"), eight), "render")
    assert half.seconds.value == render.seconds.value / 2
    assert "taken to 25; without compile" in half.seconds.source
    assert stage(plan(real(tiny), described(8, "A100-80G")), "render").seconds.value == 180
    unknown = [(real(tiny), described(8, "L40S")), (real(tiny), None), (real(tiny, render__frames=9), eight)]
    for asked, cluster in unknown:
        other = plan(asked, cluster)
        assert stage(other, "render").seconds.value is None


def test_storage_is_measured_in_the_store(tiny: dict[str, Any], tmp_path: Path) -> None:
    store = VideoStore(tmp_path / "store")
    shape = {"frames": 9, "width": 96, "height": 64}
    for number, (size, other) in enumerate([(1000, {}), (3000, {}), (9999, {"frames": 49})]):
        store.write(f"aa{number}", bytes(size), {**shape, **other})
    made = plan(recipe(tiny, render__store=tmp_path / "store", render__frames=9, sample__k=4))
    assert made.video_bytes.value == 2000
    assert "mean of 2 of this shape" in show.text(made)


def test_balanced_pools_time_and_price(tiny: dict[str, Any], tmp_path: Path) -> None:
    past = ledger(tmp_path / "past", sample=0.2, judge=0.3, render=90.0, score=2.0)
    made = plan(real(tiny, sample__k=4), described(16, "H100", 128), str(past), price=2.0)
    assert {s.name: s.balanced for s in made.stages} == {"sample": 1, "judge": 1, "render": 13, "score": 1}
    assert made.stream_hours == pytest.approx(5 / 13)
    hours = (400 * 0.2 + 400 * 0.3 + 200 * 90 + 200 * 2) / 3600
    assert made.gpu_hours == pytest.approx(hours)
    text = show.text(made)
    assert f"price       {2 * hours:.2f} for {hours:.2f} GPU-hours" in text
    assert "sft, dpo not known" in text
    told = show.as_json(made)
    json.dumps(told, allow_nan=False)
    assert told["stages"]["render"]["balanced"] == 13
    assert told["stages"]["sft"]["seconds_per_row"] is None
    assert told["price_of_known"] == pytest.approx(2 * hours)


@pytest.mark.parametrize(
    ("changes", "cluster", "says"),
    [
        ({"render__pool__num_gpus": 9}, described(16), r"render\.pool: a replica asks 9 GPUs .*has 8 GPUs"),
        ({"judge__engine__tensor_parallel_size": 16}, described(16), r"judge\.pool: a replica asks 16 GPUs"),
        ({"render__pool__size": 14}, described(16), "no room at their smallest sizes.*render 14 x 1 GPU"),
        ({"render__pool__accelerator_type": "A100"}, described(8, "H100"), r"render\.pool.*A100.*has H100"),
        ({"dpo__workers": 16}, described(8), r"dpo\.workers: 16 workers ask 16 x 1 GPU.*8 GPU"),
        ({"render__pool__num_cpus": 9}, described(8, cpus=8), r"render\.pool: a replica asks .*9 CPUs"),
        ({}, described(0, cpus=64), r"sample\.pool: a replica asks 1 GPU"),
    ],
)
def test_a_cluster_that_cannot_run_it(
    tiny: dict[str, Any], changes: dict[str, Any], cluster: Any, says: str
) -> None:
    with pytest.raises(PlanError, match=says):
        plan(real(tiny, **changes), cluster)


def test_a_pool_that_cannot_grow_to_its_largest_size_is_noted(tiny: dict[str, Any]) -> None:
    made = plan(real(tiny, render__pool__size="[1, 40]"), described(8, "H100"))
    assert any("render: the cluster has no room for its largest size, 40" in note for note in made.notes)


DRAFTS = {"draft__examples": ROOT / "vpo_ray/data/sft.jsonl", "sft__data": "null"}


def test_drafting_is_planned_with_the_llm_that_drafts(tiny: dict[str, Any], tmp_path: Path) -> None:
    splits = {"queries__splits": "{sft: 0.5, dpo: 0.5}"}
    past = ledger(tmp_path / "past", draft=2.0)
    stages = RunDir(past).read_json("ledger.json")["stages"]
    stages["draft"] |= {"in": 10, "out": 8}
    RunDir(past).write_json("ledger.json", {"stages": stages})
    llm = {"draft__llm__model": tiny["judge.model"], "draft__llm__pool": "{size: 2, num_gpus: 2}"}
    made = plan(real(tiny, **splits, **DRAFTS, **llm), described(8, "H100"), str(past))
    drafts = stage(made, "draft")
    queries = made.queries["sft"]
    assert (drafts.rows, drafts.size, drafts.replica.gpus) == (queries, (2, 2), 2)
    assert drafts.gpu_hours == pytest.approx(queries * 2.0 * 2 / 3600)
    assert made.hours == pytest.approx(made.stream_hours + queries * 2.0 / 2 / 3600)
    sft = stage(made, "sft")
    assert (sft.rows, sft.expected) == (-(-queries * 8 // 10), True)
    assert f"{'draft':<8} {queries:>17,}" in show.text(made)
    assert show.as_json(made)["stages"]["draft"]["rows"] == queries
    # It works before the stream, so it takes nothing of the room that the stream's pools have.
    assert {s.name for s in made.stages if s.balanced} == {"sample", "judge", "render", "score"}
    with pytest.raises(PlanError, match=r"draft\.llm\.pool: a replica asks 9 GPUs"):
        plan(real(tiny, **splits, **DRAFTS, **llm, draft__llm__pool__num_gpus=9), described(8))
    with pytest.raises(PlanError, match=r"draft\.llm\.pool: 2 x 5 GPUs .* have no room"):
        plan(real(tiny, **splits, **DRAFTS, **llm, draft__llm__pool__num_gpus=5), described(8))
    data = {"draft__examples": DRAFTS["draft__examples"]}
    assert "draft" not in {s.name for s in plan(recipe(tiny, **data)).phases}, "sft.data is there"
    own = plan(real(tiny, **splits, **DRAFTS, judge__engine__tensor_parallel_size=4), described(8))
    assert stage(own, "draft").replica.gpus == 4, "the judge drafts where draft.llm is unset"


def test_labelling_takes_every_query_that_the_rules_keep(tiny: dict[str, Any], tmp_path: Path) -> None:
    queries = [f"a cat, number {number}" for number in range(12)]
    (tmp_path / "queries.txt").write_text("\n".join([*queries, "", queries[1]]), "utf-8")
    tiny["queries"] = {
        "path": str(tmp_path / "queries.txt"), "size": 6, "unsafe_share": 0.5, "unsafe_judge": True
    }  # fmt: skip
    (label,) = plan(recipe(tiny)).before
    assert (label.name, label.rows, label.expected) == ("label", 12, True)


def test_an_llm_at_an_endpoint_takes_no_gpu(tiny: dict[str, Any]) -> None:
    remote = {"judge__backend": "openai", "judge__model": "gpt", "judge__engine__tensor_parallel_size": 4}
    pool = {"judge__pool": "{num_cpus: 0.5}", "sft__workers": 3, "dpo__workers": 3}
    made = plan(real(tiny, **remote, **DRAFTS, **pool), described(3))
    for name in ("judge", "draft"):
        replica = stage(made, name).replica
        assert (replica.cpus, replica.gpus, replica.pieces) == (0.5, 0, 1)
    assert not any("endpoint" in note for note in made.notes)
    wasted = plan(real(tiny, **remote), described(4))
    assert "judge.pool.num_gpus 1: its replicas only ask an endpoint, set it 0" in wasted.notes


def test_a_video_service_takes_no_gpu_and_its_price(tiny: dict[str, Any], tmp_path: Path) -> None:
    endpoint = {"second_price": 0.1, "video_price": 0.2, "request": {"seconds": "4", "size": "64x32"}}
    service = {"kind": "openai", "model": "zai-org/CogVideoX-2b", "endpoint": endpoint, "version": "1"}
    videos = {"render": json.dumps(service), "limits__max_cost": 50, "sample__k": 4}
    del tiny["render.model"]
    made = plan(recipe(tiny, **videos), described(3), price=2)
    rendered = stage(made, "render")
    assert (rendered.rows, rendered.replica.gpus, rendered.gpu_hours) == (400, 0, None)
    assert rendered.seconds.value is None, "the time that was published for the weights is a GPU's"
    assert made.video_cost == pytest.approx(240)
    lines = show.text(made)
    assert "at most 240.00 for 400 videos at 0.6, paid to the service; " in lines
    assert "up to 400 of zai-org/CogVideoX-2b; size not known before some are rendered" in lines
    assert "limits.max_cost 50 stops the run before its last video" in made.notes
    assert show.as_json(made)["video_cost"] == pytest.approx(240)
    store = VideoStore(tmp_path / "run/videos")
    settings = recipe(tiny, **videos).render
    store.write("ab", b"x" * 1000, {**key_parts(settings, "p", 1, "m"), "generator": settings.model})
    store.write("cd", b"x" * 10, {"settings": {"request": {}}, "generator": settings.model})
    assert plan(recipe(tiny, **videos)).video_bytes.value == 1000
    wasted = plan(recipe(tiny, **videos, render__pool__num_gpus=1))
    assert "render.pool.num_gpus 1: its replicas only ask an endpoint, set it 0" in wasted.notes


def test_a_phase_for_which_there_is_no_query_is_told(tiny: dict[str, Any]) -> None:
    kept = "{sft: 0, dpo: 0, eval: 1}"
    told = "dpo: no query is in the dpo split, so it stops the run: see queries.splits"
    assert told in plan(recipe(tiny, queries__splits=kept)).notes
    assert not [note for note in plan(recipe(tiny)).notes if "stops the run" in note]


def test_adaptive_rendering_is_at_most_all_of_it(tiny: dict[str, Any], tmp_path: Path) -> None:
    adaptive = {"render__strategy": "adaptive", "sample__k": 4}
    made = plan(recipe(tiny, **adaptive))
    assert (stage(made, "render").rows, stage(made, "render").expected) == (400, False)
    assert "at most 400" in show.text(made)
    assert any("adaptive: at most this many videos" in note for note in made.notes)
    past = ledger(tmp_path / "past", render=90.0)
    made = plan(recipe(tiny, **adaptive), ledger=str(past))
    assert (stage(made, "render").rows, stage(made, "render").expected) == (200, False), "aligned, at most"
    stages = RunDir(past).read_json("ledger.json")["stages"]
    stages["pair"] |= {"videos": {"all": {"videos": 80}, "adaptive": {"videos": 50}}}
    RunDir(past).write_json("ledger.json", {"stages": stages})
    made = plan(recipe(tiny, **adaptive), ledger=str(past))
    for name in ("render", "score"):
        # 40 queries then took 50 videos, and there are 100 now.
        assert (stage(made, name).rows, stage(made, name).expected) == (125, True)
    assert any("125 videos by what that run's pairs took" in note for note in made.notes)
    assert stage(plan(recipe(tiny, sample__k=4), ledger=str(past)), "render").rows == 200


def test_previews_come_before_few_full_renders(tiny: dict[str, Any], tmp_path: Path) -> None:
    looks = {"render__preview": "{steps: 1, frames: 5, probe: 10}", "sample__k": 4}
    made = plan(recipe(tiny, **looks))
    assert (stage(made, "preview").rows, stage(made, "preview").seconds.value) == (400, None)
    in_full = 10 * 4 + 90 * 2
    assert [stage(made, name).rows for name in ("render", "score")] == [in_full, in_full + 400]
    assert not stage(made, "render").expected
    assert "preview" in show.text(made)
    assert any("probe's 10 queries and 2 prompts of the others" in note for note in made.notes)
    past = ledger(tmp_path / "past", render=90.0)
    made = plan(recipe(tiny, **looks), ledger=str(past))
    look = stage(made, "preview")
    assert (look.rows, look.seconds.sure) == (200, "scaled"), "half of the candidates were aligned"
    assert look.seconds.value == pytest.approx(90 / 3 * 5 / 9)
    assert stage(made, "render").rows == 200, "no more than previews"
    assert made.hours >= 200 * look.seconds.value / 3600
    stages = RunDir(past).read_json("ledger.json")["stages"]
    RunDir(past).write_json("ledger.json", {"stages": stages | {"preview": {"seconds_per_row": 7.0}}})
    again = stage(plan(recipe(tiny, **looks), ledger=str(past)), "preview")
    assert (again.seconds.value, again.seconds.sure) == (7.0, "measured")
    all_probe = plan(recipe(tiny, **{**looks, "render__preview": "{steps: 1, probe: 1000}"}))
    assert stage(all_probe, "render").rows == 400


def test_labels_of_a_live_cluster(tiny: dict[str, Any]) -> None:
    labels = {f"{name}__pool__labels": "{vpo-group: generate}" for name in ("sample", "render", "reward")}
    labels |= {"dpo__labels": "{vpo-group: train}", "judge__pool__num_gpus": 0, "sft__workers": 2}
    generate, train = (("vpo-group", "generate"),), (("vpo-group", "train"),)
    nodes = [NodeSize(8, 1, "H100", generate)] * 3 + [NodeSize(8, 4, "H100", train)]
    made = plan(real(tiny, **labels), Cluster(tuple(nodes)))
    assert stage(made, "render").balanced == 1
    assert show.as_json(made)["cluster"][0]["labels"] == {"vpo-group": "generate"}
    with pytest.raises(PlanError, match=r"no room at their smallest .*a node labelled vpo-group=generate"):
        plan(real(tiny, **labels), Cluster(tuple(nodes[1:])))
    with pytest.raises(PlanError, match=r"dpo\.workers: 4 workers ask .*labelled vpo-group=train"):
        plan(real(tiny, **labels), Cluster(tuple(nodes[:3] * 2)))
    other = {**labels, "render__pool__labels": "{vpo-group: fast}"}
    with pytest.raises(PlanError, match=r"render\.pool: .*\(there are vpo-group=generate, vpo-group=train\)"):
        plan(real(tiny, **other), Cluster(tuple(nodes)))
    plan(real(tiny, **other), described(8, cpus=64))


def vpo(tiny: dict[str, Any], *arguments: str) -> int:
    sets = [part for key, value in tiny.items() for part in ("--set", f"{key}={value}")]
    return cli.main(["plan", str(ROOT / "jobs/recipes/tiny.yaml"), *sets, *arguments])


def test_the_command(tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert vpo(tiny, "--gpus", "4", "--gpu-type", "H100", "--cpus", "64", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cluster"] == [{"cpus": 64, "gpus": 4, "gpu_type": "H100"}]
    assert vpo(tiny, "--cpus", "1") == 2
    assert "no room at their smallest sizes" in capsys.readouterr().err
    for wrong in (["--gpu-type", "H100"], ["--gpus", "-1"], ["--address", "auto", "--gpus", "1"]):
        assert vpo(tiny, *wrong) == 2
        assert "Traceback" not in capsys.readouterr().err
    for price in ("nan", "-1", "x"):
        with pytest.raises(SystemExit):
            vpo(tiny, f"--price-per-gpu-hour={price}")
