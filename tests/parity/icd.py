"""One step of Instance-Conditional Distillation, by the functions that training uses."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from d2kd.data import InstancePriors
from d2kd.layers.attention import CellPositions, _normalized_coordinates, _sine_embeddings
from d2kd.layers.masks import valid_cells
from d2kd.layers.queries import InstanceQueries
from d2kd.losses.icd import ICDLoss, flatten_maps

from . import Arrays

LEVELS = ("p3", "p4", "p5", "p6", "p7")


def sine_positions(valid: Tensor, channels: int) -> Tensor:
    """Where each of the cells lies in its image: ``(N, H, W, channels)`` of ``(N, H, W)`` bool, the valid ones."""
    return torch.cat([*_sine_embeddings(*_normalized_coordinates(valid), channels)], dim=-1)


def outputs(arrays: Arrays) -> dict[str, Tensor]:
    """What :class:`ICDLoss` makes of the inputs of ``icd.npz``.

    Raises:
        InputError: an array is missing.
    """
    student = [arrays.tensor(f"student_feature/{level}").requires_grad_() for level in LEVELS]
    teacher = [arrays.tensor(f"teacher_feature/{level}") for level in LEVELS]
    loss = trained(arrays)
    sizes = [tuple(arrays[f"image{i}/size_hw"].tolist()) for i in range(len(teacher[0]))]
    for name in unread(len(sizes)):
        arrays[name]
    padded = tuple(arrays["padded_hw"].tolist())
    valid = valid_cells(sizes, padded, [x.shape[-2:] for x in teacher])
    channels = teacher[0].shape[1]
    embedding = flatten_maps(sine_positions(x, channels).movedim(-1, 1) for x in valid)
    positions = CellPositions.from_masks(valid, channels)
    valid = torch.cat([x.flatten(1) for x in valid], dim=1)
    queries = InstanceQueries(
        descriptors=arrays.tensor("descriptor").transpose(0, 1),
        centers=arrays.tensor("query_centers"),
        edge_distances=arrays.tensor("edge_distances"),
        is_positive=arrays.tensor("query_is_real") > 0,
        is_used=~arrays.tensor("query_is_padding"),
    )

    loss.progress = 1.0
    readings = loss.run_decoder(
        flatten_maps(student), flatten_maps(teacher), valid, positions, queries
    )
    distillation = loss.weighted_terms(readings)["distillation"]
    gradients = torch.autograd.grad(distillation, student)

    asked = loss.query_encoder(queries.descriptors)
    found = {
        "position_embedding": embedding.transpose(0, 1),
        "key_is_padding": ~valid,
        "encoded_queries": asked.transpose(0, 1),
    }
    for k, (layer, reading) in enumerate(zip(loss.decoder, readings)):
        logits = layer.logits(asked, flatten_maps(teacher), positions, valid)
        asked = reading.decoded.queries
        found |= {
            f"layer{k}/decoded_queries": asked.transpose(0, 1),
            f"layer{k}/attention_logits": logits,
            f"layer{k}/teacher_values": reading.decoded.values.permute(2, 0, 1, 3),
            f"loss/layer{k}/identification": reading.identification,
            f"loss/layer{k}/localization": reading.localization,
        }
    found["loss/distill"] = distillation
    return found | {
        f"student_feature_grad/{level}": gradient for level, gradient in zip(LEVELS, gradients)
    }


def unread(images: int) -> list[str]:
    """What a whole file has besides: ``descriptor`` is taken as given, and these were its origin."""
    truth = [f"image{i}/{part}" for i in range(images) for part in ("gt_boxes_xyxy", "gt_classes")]
    return [*truth, "query_classes"]


def trained(arrays: Arrays) -> ICDLoss:
    """The loss with the file's weights."""
    named = (re.match(r"(?:weight/decoder/|layer)(\d+)/", name) for name in arrays)
    layers = max(1, len({found[1] for found in named if found}))
    channels, classes = int(arrays["hidden_dim"]), int(arrays["num_classes"])
    loss = ICDLoss(
        priors=InstancePriors.uniform(classes),
        heads=int(arrays["num_heads"]),
        layers=layers,
        distillation_weight=8.0,
    )
    loss.build(
        classes,
        arrays["weight/student_value_projection/0.weight"].shape[1],
        channels,
        hidden=len(arrays["weight/decoder/0/ffn_in.bias"]),
    )

    def load(module: torch.nn.Module, name: str, rows: slice = slice(None)) -> None:
        separator = "_" if name.endswith("in_proj") else "."
        state = {
            part: arrays.tensor(f"weight/{name}{separator}{part}")[rows]
            for part in ("weight", "bias")
        }
        module.load_state_dict(state)

    for mlp in ("query_encoder", "auxiliary_head"):
        linears = [m for m in getattr(loss, mlp) if isinstance(m, torch.nn.Linear)]
        for k, linear in enumerate(linears):
            load(linear, f"{mlp}/{k}")
    for k, layer in enumerate(loss.decoder):
        name = f"decoder/{k}/"
        for third, projection in enumerate((layer.query, layer.key, layer.value)):
            rows = slice(third * channels, (third + 1) * channels)
            load(projection, f"{name}cross_attention.in_proj", rows)
        load(layer.out, f"{name}cross_attention.out_proj")
        load(layer.position, f"{name}position_projection")
        load(layer.perceptron[0], f"{name}ffn_in")
        load(layer.perceptron[2], f"{name}ffn_out")
        load(layer.attention_norm, f"{name}norm_after_attention")
        load(layer.perceptron_norm, f"{name}norm_after_ffn")
        load(loss.student_values[k], f"student_value_projection/{k}")
    return loss
