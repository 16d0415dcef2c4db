"""What ``save_pretrained`` would write of a model's weights, settled by their shapes, and written as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from deltatune.hf.pieces import groups_of
from deltatune.hf.tensor_file import TensorFile, is_writable

__all__ = ["FILE_SIZE", "SavedWeights"]

#: transformers' own.
FILE_SIZE = "50GB"


@dataclass(frozen=True)
class SavedWeights:
    """The weight files of a model: names, places and the order in which its tensors are wanted.

    Attributes:
        groups: names in the model, those together that become tensors of the files together.
    """

    groups: list[list[str]]
    _model: Any
    _files: dict[str, dict[str, Tensor]]  # what each will hold, on the meta device
    _index: str | None

    @classmethod
    def of(cls, model: Any, described: Mapping[str, Tensor], max_shard_size: int | str = FILE_SIZE) -> SavedWeights:
        """Those that ``model.save_pretrained`` writes of such tensors.

        Args:
            model: of transformers, with whatever weights.
            described: its ``state_dict()`` on the meta device.
            max_shard_size: of a file, in bytes or as transformers takes it.

        Raises:
            ValueError: weights that are converted across layers, or of a type that safetensors have not.
        """
        ignored = {*(model._keys_to_ignore_on_save or ())}
        kept = {name: tensor for name, tensor in described.items() if name not in ignored}
        kept = remove_tied_weights_from_state_dict(kept, model)

        def reverted(names: list[str]) -> dict[str, Tensor]:
            return dict(revert_weight_conversion(model, {name: kept[name] for name in names}))

        whole = reverted(list(kept))
        if not all(map(is_writable, whole.values())):
            raise ValueError("safetensors have no type for its weights")
        groups = [names for names, _ in groups_of(kept, whole, reverted)]
        split = split_state_dict_into_shards_factory(
            whole,
            get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
            # experts that were one tensor stay in one file
            get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        index = None
        if split.is_sharded:
            own = {name for name, _ in model.named_parameters()}  # those that are tied once
            total = sum(tensor.numel() for name, tensor in described.items() if name in own)
            metadata = {"total_parameters": total, **split.metadata}
            index = json.dumps({"metadata": metadata, "weight_map": split.tensor_to_filename}, indent=2, sort_keys=True)
        files = {file: {name: whole[name] for name in names} for file, names in split.filename_to_tensors.items()}
        return cls(groups, model, files, index)

    def write(self, folder: Path, weight: Callable[[str], Tensor]) -> None:
        """Writes the files, a group of tensors in memory at a time.

        Args:
            folder: where to.
            weight: a tensor of the model on the CPU, by its name; asked for in the order of ``groups``.
        """
        with ExitStack() as opened:
            files = {name: opened.enter_context(TensorFile(folder / name, held)) for name, held in self._files.items()}
            places = {tensor: files[name] for name, held in self._files.items() for tensor in held}
            for names in self.groups:
                tensors = revert_weight_conversion(self._model, {name: weight(name) for name in names})
                while tensors:
                    name, tensor = tensors.popitem()
                    places[name].write(name, tensor)
        if self._index is not None:
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(self._index + "\n", encoding="utf-8")
