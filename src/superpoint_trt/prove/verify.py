"""Proves on real images that a converted model still finds the points of its fp32 reference."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from superpoint_trt.core.files import PathLike, named, names_below
from superpoint_trt.core.image import find_images
from superpoint_trt.core.progress import Progress
from superpoint_trt.core.types import ModelDescription, Precision, SuperPointError, least_exact
from superpoint_trt.prove.comparison import Comparison, Errors, ImageResult, errors_to_json, percentile
from superpoint_trt.prove.gates import Gate, Measurements, check_limits, judge
from superpoint_trt.prove.known_faults import FEWEST_POINTS, NOT_FINITE, Finding
from superpoint_trt.prove.references import open_reference
from superpoint_trt.prove.tables import Cell, Column, Table
from superpoint_trt.run.extractor import SuperPoint


@dataclass
class Verification:
    """The verdict and its evidence."""

    model: str
    model_runtime: str
    reference: str
    """The reference's file, and what it ran on."""
    precision: Precision
    """Whose limits hold: the model's, or the less exact one that the runtime computes in."""
    gates: list[Gate]
    findings: list[Finding]
    """Known faults that most images show."""
    outputs: dict[str, Errors | None]
    """Errors of each output over all images."""
    images: list[ImageResult]
    problems: list[str]
    """One line for each image that could not be used."""
    notes: list[str]
    """What the reader should know, but no gate fails for."""

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return all(gate.passed for gate in self.gates)

    @property
    def failed(self) -> list[Gate]:
        """The gates that do not hold."""
        return [gate for gate in self.gates if not gate.passed]

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "passed": self.passed,
            "model": self.model,
            "model_runtime": self.model_runtime,
            "reference": self.reference,
            "precision": self.precision.value,
            "gates": [gate.to_json() for gate in self.gates],
            "findings": [finding.to_json() for finding in self.findings],
            "outputs": errors_to_json(self.outputs),
            "images": [image.to_json() for image in self.images],
            "problems": self.problems,
            "notes": self.notes,
        }


def report_of(verifications: Sequence[Verification]) -> dict[str, Any]:
    """The report of one model; of several: whether all passed, and the reports under "models"."""
    if len(verifications) == 1:
        return verifications[0].to_json()
    return {"passed": all(one.passed for one in verifications), "models": [one.to_json() for one in verifications]}


def verification_table(verifications: Sequence[Verification]) -> Table:
    """What the gates of several models measured: a column for each model, a row for each gate."""
    names = list(dict.fromkeys(gate.name for one in verifications for gate in one.gates))
    measured = [{gate.name: gate.value for gate in one.gates} for one in verifications]
    rows: list[list[Cell]] = [["verdict", *("passed" if one.passed else "FAILED" for one in verifications)]]
    rows.append(["precision", *(one.precision.value for one in verifications)])
    for name in names:
        values = [one.get(name) for one in measured]
        rows.append([name, *(None if value is None else f"{value:.6g}" for value in values)])
    return Table([Column("gate"), *(Column(one.model) for one in verifications)], rows)


def verify(
    model: PathLike,
    weights: PathLike,
    image_paths: PathLike | Iterable[PathLike],
    limits: Mapping[str, float] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    most_images: int | None = None,
    threads: int | None = None,
    subpixel: bool | None = None,
    allow_host_code: bool = False,
) -> Verification:
    """Runs a model and its reference on the same images and compares points, scores, descriptors and matches.

    Args:
        model: any model file that `SuperPoint` opens.
        weights: the reference: the checkpoint that the model was made from, or an fp32 `dense` or `heads` .onnx.
        image_paths: real images: a folder, as `find_images` reads it, or the files themselves.
        limits: gate name -> limit, in place of the limits of the model's precision.
        device: where the model runs, as `SuperPoint` takes it. The reference runs on the CPU.
        progress: called with (images done, all images).
        most_images: use only the first so many.
        threads: CPU threads of the model.
        subpixel: compare keypoints between pixels, or on whole ones; None: as the model has them. It is the same for
            model and reference.
        allow_host_code: run the code that a version-compatible engine carries.

    Raises:
        SuperPointError: unusable model or reference, unknown gate, no readable image, or too few keypoints to prove
            anything. A single bad image is listed in `problems`.
    """
    limits = dict(limits or {})
    check_limits(limits)
    named_images = _with_names(image_paths, most_images)
    results, problems = [], []
    with SuperPoint(
        model, device=device, threads=threads, subpixel=subpixel, allow_host_code=allow_host_code
    ) as superpoint:
        reference = open_reference(weights, superpoint.description.descriptors_of)
        _check_same_network(model, superpoint.description, weights, reference.description)
        comparison = Comparison(superpoint, reference)
        for done, (name, path) in enumerate(named_images, start=1):
            try:
                results.append(comparison.run(name, path))
            except SuperPointError as error:
                problems.append(named(error, path))
            if progress:
                progress(done, len(named_images))
        description, runtime = superpoint.description, superpoint.runtime
        places = "sub-pixel" if superpoint.options.subpixel else "on whole pixels"
    if not results:
        raise SuperPointError(f"no image could be used: {problems[0] if problems else 'none was given'}")
    _check_proof(comparison.proving_points)
    voters = sum(1 for result in results if _can_show_faults(result))
    findings = _shown_by_most(results, voters)
    measured = _measure(results, comparison.score_error_max, len(findings) if voters else None)
    precision = least_exact([description.precision, runtime.computed or description.precision]) or description.precision
    return Verification(
        model=str(model),
        model_runtime=str(runtime),
        reference=f"{weights} ({reference.runtime})",
        precision=precision,
        gates=judge(measured, precision, limits),
        findings=findings,
        outputs=comparison.outputs(),
        images=results,
        problems=problems,
        notes=[
            *_notes(description, reference.description, voters),
            f"keypoints of both are {places}",
            *([_computed_note(description, precision)] if precision is not description.precision else []),
            *([reference.note] if reference.note else []),
        ],
    )


def _check_same_network(
    model: PathLike, description: ModelDescription, weights: PathLike, reference: ModelDescription
) -> None:
    for name in ("stride_px", "descriptor_dim"):
        got, wanted = getattr(description, name), getattr(reference, name)
        if got != wanted:
            raise SuperPointError(
                f"{model} has {name} {got}, the reference {weights} {wanted}: not the same network. Name the "
                "checkpoint that the model was made from: --weights."
            )


def _computed_note(model: ModelDescription, precision: Precision) -> str:
    return f"the {model.precision.value} model was computed in {precision.value}, whose limits hold here"


def _check_proof(points: int) -> None:
    if points < FEWEST_POINTS:
        raise SuperPointError(
            f"the reference finds {points} keypoints in all images that are not blank; expected {FEWEST_POINTS} or "
            "more, or nothing is proven: use real photographs."
        )


def _with_names(image_paths: PathLike | Iterable[PathLike], most: int | None) -> list[tuple[str, Path]]:
    """Each image and its name: the path below the given folder, or below the folder that all given files share."""
    if isinstance(image_paths, (str, os.PathLike)):
        folder, found = Path(image_paths), find_images(image_paths, most)
        return [(path.relative_to(folder).as_posix() if folder.is_dir() else path.name, path) for path in found]
    paths = [Path(path) for path in image_paths][:most]
    return list(zip(names_below(paths), paths))


def _measure(results: Sequence[ImageResult], score_error_max: float | None, findings: int | None) -> Measurements:
    """Adds up the images. `findings` is None if no image can show a fault."""
    similar = np.concatenate([result.cosines for result in results])
    correlations = [r.score_rank_correlation for r in results if r.score_rank_correlation is not None]
    return Measurements(
        score_error_max=score_error_max,
        keypoints_found_share=_found_share(results),
        score_rank_correlation=float(np.mean(correlations)) if correlations else None,
        descriptor_cosine_median=percentile(similar, 50),
        descriptor_cosine_p1=percentile(similar, 1),
        matches_kept_share=_share(sum(r.model_matches for r in results), sum(r.reference_matches for r in results)),
        findings=None if findings is None else float(findings),
    )


def _found_share(results: Sequence[ImageResult]) -> float | None:
    """The share of points found again, the worse of both directions; 0 if the model finds none at all."""
    again = _share(sum(r.found_again for r in results), sum(r.reference_keypoints for r in results))
    back = _share(sum(r.found_back for r in results), sum(r.model_keypoints for r in results))
    if back is None:
        return None if again is None else 0.0
    return back if again is None else min(again, back)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _can_show_faults(result: ImageResult) -> bool:
    """Whether an image has enough points to show a fault, or shows one anyway."""
    return bool(result.findings) or result.model_keypoints >= FEWEST_POINTS


def _shown_by_most(results: Sequence[ImageResult], voters: int) -> list[Finding]:
    """One finding for each fault that most images show, with their number.

    Args:
        results: all images.
        voters: how many of them can show a fault.

    Returns:
        A fault that only a minority shows may be chance and is left out, unless it is a value that is not finite.
    """
    by_name: dict[str, list[Finding]] = {}
    for result in results:
        for finding in result.findings:
            by_name.setdefault(finding.name, []).append(finding)
    return [
        Finding(name, f"{found[0].detail} ({len(found)} of {voters} images that can show it)")
        for name, found in by_name.items()
        if len(found) * 2 > voters or name == NOT_FINITE
    ]


def _notes(model: ModelDescription, reference: ModelDescription, voters: int) -> list[str]:
    notes = []
    if not voters:
        notes.append(
            f"known faults could not be looked for: the model finds fewer than {FEWEST_POINTS} keypoints in every image"
        )
    if model.approximation != reference.approximation:
        one, words = ("model", model.approximation) if model.approximation else ("reference", reference.approximation)
        notes.append(f"the {one} alone was exported with an approximation: {words}")
    elif model.approximation:
        notes.append(
            f"both were exported with an approximation, which this verdict does not see: {model.approximation}"
        )
    if model.checkpoint_sha256 and reference.checkpoint_sha256 not in (None, model.checkpoint_sha256):
        notes.append(
            f"the model names another checkpoint as its source (sha256 {model.checkpoint_sha256[:12]}) than the "
            f"reference (sha256 {str(reference.checkpoint_sha256)[:12]})"
        )
    if model.sampling is not reference.sampling:
        notes.append(
            f"the model samples descriptors the {model.sampling.value} way, the reference the "
            f"{reference.sampling.value} way"
        )
    return notes
