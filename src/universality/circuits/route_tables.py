"""How what is told of B comes to the last position, of an induction task: which position writes it (off_by_one), by
which state channels (channels), what the convolution's taps bring there (taps), which mixing can be cut (mixing), and
the circuit as a graph, compared between models."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from universality.circuits.circuit import FIRST, Circuit
from universality.circuits.columns import CHANNELS, ENDS, MIXING, OFF_BY_ONE, TAPS
from universality.circuits.effects import joined
from universality.circuits.induction_graph import Criteria, induction_graph
from universality.circuits.mixing import MixingCuts
from universality.circuits.off_by_one import Profile, kept_offsets, layer_shares, strongest, whole_profile
from universality.circuits.ssm_fast import ssm_patching
from universality.circuits.ssm_paths import THROUGH
from universality.runtime import progress
from universality.storage import write_json

_TAP_OFFSETS = (0, 1, 2)
"""Positions after B whose writes taps are exchanged in: B itself stands one after A, and taps reach back a few."""


def write_routes(circuit: Circuit, folder: Path) -> None:
    """off_by_one, taps, channels and mixing.parquet; no rows for a model that has no such layers or fails the task."""
    has_layers = bool({"attn.0.z", "mamba.0.y"} & circuit.model.sites.keys())
    profiles, taps, channels, cuts = [], [], [], []
    if circuit.passes and has_layers:
        size = circuit.settings.batch_size
        profile = whole_profile(circuit.model, circuit.task, circuit.corruption, batch_size=size)
        profiles, cuts = _profile_rows(circuit, profile), _cut_rows(circuit)
        if circuit.model.family.recurrence is not None:
            taps, channels = _tap_rows(circuit), _channel_rows(circuit, profile.of_kind("mamba"))
    circuit.write(profiles, folder / "off_by_one.parquet", OFF_BY_ONE)
    circuit.write(taps, folder / "taps.parquet", TAPS)
    circuit.write(channels, folder / "channels.parquet", CHANNELS)
    circuit.write(cuts, folder / "mixing.parquet", MIXING)


def _profile_rows(circuit: Circuit, profile: Profile) -> list[dict]:
    """`share` is of the layer's summed effect, `mean_offset` its layer's; both are missing where that sum is nothing.
    `strongest`: is it the layer with the largest?"""
    layers = layer_shares(profile, circuit.drawn, circuit.settings.confidence)
    first = strongest(layers)
    rows = []
    for sender, layer, effects in zip(profile.senders, layers, profile.effects, strict=True):
        for k, (offset, values) in enumerate(zip(profile.offsets, effects, strict=True)):
            place = {"sender": sender.name, "layer": sender.layer, "offset": offset, "strongest": layer is first}
            row = {"corruption": circuit.corruption, **place, **circuit.described(values)}
            if layer.shares is not None:
                row |= {f"share{end}": float(x[k]) for end, x in zip(ENDS, layer.shares, strict=True)}
            if layer.mean_offset is not None:
                row |= {f"mean_offset{end}": float(x) for end, x in zip(ENDS, layer.mean_offset, strict=True)}
            rows.append(row)
    return rows


def _tap_rows(circuit: Circuit) -> list[dict]:
    """What each tap brings to the write of B's position and those after it, of every layer, under each corruption."""
    rows = []
    for corruption in circuit.task.corrupted:
        for through, found in _tap_effects(circuit, corruption).items():
            n_taps = 1 + max(tap for *_, tap in found)
            members = []
            for (sender, offset, tap), parts in found.items():
                place = {"sender": sender.name, "layer": sender.layer, "offset": offset, "tap": tap}
                reads = {"reads": offset - (n_taps - 1) + tap, "through": through}
                members.append(place | reads | circuit.effect(corruption, joined(parts)))
            circuit.mark(members)
            rows += members
    return rows


def _tap_effects(circuit: Circuit, corruption: str) -> dict[str, dict[tuple, list[torch.Tensor]]]:
    """By what of the write a tap changes: (sender, offset, tap) -> patched minus clean metrics of each batch."""
    found: dict[str, dict[tuple, list[torch.Tensor]]] = {through: defaultdict(list) for through in THROUGH}
    offsets = kept_offsets(circuit.task, _TAP_OFFSETS)
    batches = circuit.task.batches(circuit.settings.batch_size)
    for batch in progress(batches, f"{circuit.task.name}, {corruption}: taps, batches"):
        with torch.inference_mode():
            patching = ssm_patching(circuit.model, batch, corruption)
            for through in THROUGH:
                for effect in patching.conv_taps(offsets, through):
                    found[through][effect.sender, effect.offset, effect.tap].append(effect.values)
    return found


def _channel_rows(circuit: Circuit, profile: Profile) -> list[dict]:
    """The write of the layer and offset that moves most, of each channel (Mamba) or head (Mamba-2) alone."""
    strength = np.abs(profile.effects[..., FIRST].mean(-1))
    sender, offset = np.unravel_index(strength.argmax(), strength.shape)
    layer, at = profile.senders[sender].layer, profile.offsets[offset]
    found: dict[int | None, list[torch.Tensor]] = defaultdict(list)
    for batch in circuit.task.batches(circuit.settings.batch_size):
        with torch.inference_mode():
            for effect in ssm_patching(circuit.model, batch, circuit.corruption).write_channels(layer, at):
                found[effect.channel].append(effect.values)
    rows = [
        {"sender": profile.senders[sender].name, "layer": layer, "offset": at, "channel": channel}
        | circuit.effect(circuit.corruption, joined(parts))
        for channel, parts in found.items()
    ]
    circuit.mark(rows)
    return rows


def _cut_rows(circuit: Circuit) -> list[dict]:
    cuts = MixingCuts(circuit.model, circuit.task, circuit.settings.batch_size).cuts()
    return [
        {"layer": cut.layer, "ways": "+".join(cut.ways), **circuit.described(cut.values.double().cpu().numpy())}
        for cut in cuts
    ]


def write_graph(circuit: Circuit, out: Path) -> None:
    """The circuit as a graph; without nodes where none is found."""
    settings = circuit.settings
    criteria = Criteria(
        bootstrap_seed=settings.bootstrap_seed,
        min_share=settings.min_share,
        min_accuracy=settings.min_accuracy,
        alpha=settings.false_discovery_rate,
        bootstrap_samples=settings.bootstrap_samples,
        confidence=settings.confidence,
    )
    write_json(out, induction_graph(circuit.model, circuit.task, criteria, settings.batch_size).to_dict())
