"""Files for VBench's own command, which has an environment of its own, and the results that it leaves.

`vpo evaluate --export vbench --to DIR` is `export_vbench`, `vpo evaluate --import-vbench FILE` is
`import_vbench`. A folder is read by `vbench evaluate --videos_path DIR/<set>/<video model>/<policy>`.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from vpo_ray.evaluation.sets import DIMENSIONS, QUALITY, SEMANTIC, SetError
from vpo_ray.files.folder import Folder
from vpo_ray.files.input_files import READ_ERRORS, InputError, InputFile, find_files, why_unreadable
from vpo_ray.files.text_files import TextFileError, decode
from vpo_ray.records import Row, normalise, query_id
from vpo_ray.storage.videos import VideoDamaged, VideoMissing, VideoStore

logger = logging.getLogger(__name__)

INFO_FILE, MANIFEST = "vbench_full_info.json", "manifest.json"
MEASURE = "vbench_"  # before a dimension: the name of a sample's measure
_RESULTS = "_eval_results.json"
_NAME_BYTES = 255  # of a file's name, on common filesystems
_VIDEO = re.compile(r"(?P<prompt>.+)-(?P<seed>\d{1,9})\.mp4", re.DOTALL)

# Least and greatest value of a dimension, between which VBench normalises it; 0 and 1 for others. Weights of
# its total (scripts/constant.py and scripts/cal_final_score.py of Vchitect/VBench).
_RANGE = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
_WEIGHT = {"dynamic_degree": 0.5}
_QUALITY_WEIGHT, _SEMANTIC_WEIGHT = 4, 1


@dataclass(frozen=True)
class VBenchResults:
    """What VBench says of the videos of one folder.

    Args:
        means: by dimension, in 0..1, as VBench computed them.
        measures: by sample id, the sample's values as `vbench_<dimension>`, in 0..1.
    """

    set: str
    video_model: str
    policy: str
    means: dict[str, float] = field(default_factory=dict)
    measures: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def total(self) -> float | None:
        """VBench's total score in 0..1; None unless all 16 dimensions were computed."""
        if set(self.means) != set(DIMENSIONS):
            return None
        quality, semantic = self._score(QUALITY), self._score(SEMANTIC)
        weights = _QUALITY_WEIGHT + _SEMANTIC_WEIGHT
        return (_QUALITY_WEIGHT * quality + _SEMANTIC_WEIGHT * semantic) / weights

    def _score(self, dimensions: Sequence[str]) -> float:
        weighted = 0.0
        for dimension in dimensions:
            least, most = _RANGE.get(dimension, (0.0, 1.0))
            weight = _WEIGHT.get(dimension, 1.0)
            weighted += weight * (self.means[dimension] - least) / (most - least)
        return weighted / sum(_WEIGHT.get(dimension, 1.0) for dimension in dimensions)


# Export


def export_vbench(samples: Iterable[Row], rows: Iterable[Row], to: str) -> dict[str, int]:
    """Copy videos into folders whose file names VBench's command reads.

    In `to`, a set has a folder with INFO_FILE (its queries, where they are VBench's), MANIFEST (every file,
    and what was left out and why) and the videos, `<video model>/<policy>/<query>-<seed>.mp4`: VBench finds a
    video by the original query, whatever prompt was rendered. The folder of the videos holds nothing else,
    because VBench takes the ending of their names from any file in it.

    Args:
        samples: of `samples.SAMPLE`.
        rows: the queries of their sets, see `sets.read_set`.
        to: folder or URI.

    Returns:
        How many videos were `written`, and how many samples were `left_out`.

    Raises:
        SetError: no sample, or videos of another export in the folder, which VBench would read too.
        StorageError: the folder cannot be written.
    """
    queries = {row["query_id"]: row for row in rows}
    by_set: dict[str, list[Row]] = {}
    for sample in samples:
        by_set.setdefault(sample["set"], []).append(sample)
    if not by_set:
        raise SetError("there is no sample to export: evaluate first")
    counts = {"written": 0, "left_out": 0}
    for name, some in sorted(by_set.items()):
        ids = {sample["query_id"] for sample in some}
        known = {one: row for one, row in queries.items() if one in ids}
        manifest = _export_set(some, known, Folder(to) / name)
        counts["written"] += len(manifest["videos"])
        counts["left_out"] += len(manifest["left_out"])
    return counts


def _export_set(samples: Sequence[Row], queries: Mapping[str, Row], folder: Folder) -> dict[str, Any]:
    files: dict[str, Row] = {}
    left_out: list[Row] = []
    for sample in sorted(samples, key=lambda row: row["sample_id"]):
        about = {key: sample[key] for key in ("sample_id", "policy", "video_model", "query", "seed")}
        query = queries.get(sample["query_id"], {}).get("prompt_en", sample["query"])
        name = f"{query}-{sample['seed']}.mp4"
        if why := _why_no_video(sample) or _why_no_name(name):
            left_out.append({**about, "why": why})
        else:
            place = f"{sample['video_model']}/{sample['policy']}/{name}"
            files[place] = {
                **about,
                "file": place,
                "video_key": sample["video_key"],
                "uri": sample["video_uri"],
            }
    if others := set(folder.files(".mp4")) - set(files):
        raise SetError(
            f"{folder.uri} has {len(others)} videos of another export, which VBench would read too, such as "
            f"{min(others)!r}: give another --to, or move them away"
        )
    videos = []
    for place, entry in files.items():
        try:
            folder.write(place, _store(entry.pop("uri")).read(entry["video_key"]))
        except (VideoMissing, VideoDamaged) as error:
            left_out.append({**entry, "why": str(error)})
        else:
            videos.append(entry)
    manifest = {"videos": videos, "left_out": left_out}
    info = [
        {
            "prompt_en": row["prompt_en"],
            "dimension": row["dimension"],
            **({"auxiliary_info": row["auxiliary_info"]} if row["auxiliary_info"] else {}),
        }
        for _, row in sorted(queries.items())
        if "dimension" in row
    ]
    if info:
        folder.write_json(INFO_FILE, info)
    folder.write_json(MANIFEST, manifest)
    return manifest


def _store(uri: str) -> VideoStore:
    """The store that a video's path or URI, `<store>/ab/<key>.mp4`, is in."""
    place, sign, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return VideoStore(f"{place.rsplit('/', 2)[0]}{sign}{options}")


def _why_no_video(sample: Row) -> str | None:
    if sample["video_key"] is not None:
        return None
    return sample["error"] or sample["skipped"] or "it has no video"


def _why_no_name(name: str) -> str | None:
    """VBench looks for exactly this name in the folder's listing: no other would be found."""
    if "/" in name or "\x00" in name:
        return "the query cannot be the name of a file: it has a / or a null character"
    if len(name.encode()) > _NAME_BYTES:
        return f"the query is too long for the name of a file: {len(name.encode())} bytes, {_NAME_BYTES} fit"
    return None


# Import


def import_vbench(path: str, samples: Iterable[Row]) -> list[VBenchResults]:
    """Read the results of VBench's command back to the samples whose videos it was given.

    A video is recognised by the end of its path, `<set>/<video model>/<policy>/<query>-<seed>.mp4` (or less
    of it, where one sample only fits). Two values of VBench 0.1.5 are put right: those of imaging_quality are
    0..100 a video, and human_action reads the action up to the first `-` of a query, so that its values for
    queries with one say nothing and are left out.

    Args:
        path: a results file, `<name>_eval_results.json`; or a glob or folder of such files, as of dimensions
            that were computed one by one.
        samples: of `samples.SAMPLE`.

    Returns:
        One for each folder of videos that the files are about.

    Raises:
        SetError: a file that is not of VBench, one without a video of these samples, or a dimension of one
            folder in two files.
    """
    key = "--import-vbench"
    try:
        found = find_files(path, key, {".json"})
        files = [file for file in found if file.name.endswith(_RESULTS)] if len(found) > 1 else found
        contents = {f"{key} {file}": _content(file, key) for file in files}
    except InputError as error:
        raise SetError(str(error)) from error
    if not contents:
        raise SetError(f"{key} {path}: no file is called <name>{_RESULTS}")
    index: dict[tuple[str, int], list[Row]] = {}
    for sample in samples:
        index.setdefault((sample["query_id"], sample["seed"]), []).append(sample)
    results: dict[tuple[str, str, str], VBenchResults] = {}
    for where, content in contents.items():
        _take(content, where, index, results)
    return [results[place] for place in sorted(results)]


def _content(file: InputFile, key: str) -> Any:
    try:
        with file.open() as stream:
            text = decode(stream.read(), str(file))
    except TextFileError as error:
        raise SetError(f"{key} {file}: {error.reason}") from error
    except READ_ERRORS as error:
        raise SetError(f"{key} {file}: {why_unreadable(error)}") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SetError(f"{key} {file}: not JSON: {error}") from error


def _take(
    content: Any,
    where: str,
    index: Mapping[tuple[str, int], list[Row]],
    results: dict[tuple[str, str, str], VBenchResults],
) -> None:
    """Add what a results file says."""
    values = _checked(content, where)
    unknown = total = 0
    for dimension, (mean, videos) in values.items():
        scale = 100 if dimension == "imaging_quality" else 1
        places = set()
        for path, value in videos:
            total += 1
            sample = _sample_of(path, index)
            if sample is None:
                unknown += 1
                continue
            place = (sample["set"], sample["video_model"], sample["policy"])
            if place not in places and dimension in results.setdefault(place, VBenchResults(*place)).means:
                raise SetError(f"{where}: {dimension} of {'/'.join(place)} is in another file too: give one")
            places.add(place)
            if math.isfinite(value) and not (dimension == "human_action" and "-" in sample["query"]):
                measures = results[place].measures.setdefault(sample["sample_id"], {})
                measures[f"{MEASURE}{dimension}"] = value / scale
        if len(places) > 1:
            raise SetError(
                f"{where}: {dimension} is of several folders of videos: run VBench for one at a time"
            )
        for place in places:
            # Older versions leave the mean of imaging_quality in 0..100 too.
            results[place].means[dimension] = mean / scale if mean > 1 else mean
    if total == unknown:
        raise SetError(
            f"{where}: none of its {total} videos is of this evaluation; they are recognised by their path, "
            "<set>/<video model>/<policy>/<query>-<seed>.mp4, as --export vbench writes it"
        )
    if unknown:
        logger.warning("%s: %d of %d videos are not of this evaluation", where, unknown, total)


def _checked(content: Any, where: str) -> dict[str, tuple[float, list[tuple[str, float]]]]:
    """Mean, and path and value of each video, by dimension. Raises SetError."""
    expected = "expected {dimension: [mean, [{video_path, video_results}, …]]}, as VBench's command leaves it"
    if not isinstance(content, dict) or not content:
        raise SetError(f"{where}: {expected}")
    checked = {}
    for dimension, value in content.items():
        if dimension not in DIMENSIONS:
            raise SetError(f"{where}: {dimension!r} is no dimension of VBench; {expected}")
        try:
            mean, entries = value
            videos = [(entry["video_path"], entry["video_results"]) for entry in entries]
        except (TypeError, ValueError, KeyError) as error:
            raise SetError(f"{where}: {dimension}: {expected}") from error
        for path, result in [("", mean), *videos]:
            if not isinstance(path, str) or not isinstance(result, (bool, int, float)):
                raise SetError(f"{where}: {dimension}: {result!r} is no number; {expected}")
        checked[dimension] = (float(mean), [(path, float(result)) for path, result in videos])
    return checked


def _sample_of(path: str, index: Mapping[tuple[str, int], list[Row]]) -> Row | None:
    """The sample that a video is of: its folders are those of the export, as far as the path names them."""
    *folders, name = PurePosixPath(path).parts[-4:] or ("",)
    match = _VIDEO.fullmatch(name)
    if match is None or not folders:
        return None
    try:
        key = query_id(normalise(match["prompt"])), int(match["seed"])
    except UnicodeEncodeError:  # a lone surrogate: no query has one
        return None
    fitting = [
        sample
        for sample in index.get(key, [])
        if [sample["set"], sample["video_model"], sample["policy"]][-len(folders) :] == folders
    ]
    return fitting[0] if len(fitting) == 1 else None
