"""A small untrained DINOv2 with its saliency decoder, and an ONNX file of it that is built like the shipped one."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from benchmarks.photos import fetch
from benchmarks.photos.weights import Decoder

SIDE, WIDTH, DEPTH, HEADS = 56, 16, 4, 2  # the small model has 16 patches


def small(seed=0):
    """An untrained model and decoder with the architecture of the shipped ones."""
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=SIDE, patch_size=14, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0, init_values=1.0
    )
    for parameter in model.parameters():  # otherwise biases are zero and would match in any order
        nn.init.normal_(parameter, std=0.3)
    decoder = Decoder(WIDTH, (8, 6, 4), SIDE)
    for number in (1, 2, 3):
        norm = getattr(decoder, f"bn{number}")
        nn.init.normal_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
    return model.eval(), decoder.eval()


class OnnxFile:
    """A model and a decoder in the form of the shipped ONNX file: Hugging Face's names, unnamed weights of linear
    layers (keys first), and a position embedding that the graph computes."""

    def __init__(self, model, decoder):
        from onnx import TensorProto, helper, numpy_helper

        self.helper, self.numpy, self.float32 = helper, numpy_helper, TensorProto.FLOAT
        self.nodes, self.values, self.count = [], [], 0
        tokens = self.embedded(model)
        for number, block in enumerate(model.blocks):
            tokens = self.block(tokens, block, f"backbone.encoder.layer.{number}.")
        tokens = self.norm(tokens, model.norm, "backbone.layernorm")
        self.saliency(tokens, decoder)

    def value(self, tensor, name=None):
        name = name or f"onnx::MatMul_{len(self.values)}"
        self.values.append(self.numpy.from_array(tensor.detach().numpy(), name))
        return name

    def op(self, kind, *inputs, out=None, **attributes):
        self.count += 1
        out = out or f"out_{self.count}"
        self.nodes.append(self.helper.make_node(kind, list(inputs), [out], **attributes))
        return out

    def shaped(self, x, *shape):
        return self.op("Reshape", x, self.value(torch.tensor(shape), f"shape_{self.count}"))

    def linear(self, x, layer, name):
        weight = self.value(layer[0].T.contiguous())
        return self.op("Add", self.value(layer[1], f"{name}.bias"), self.op("MatMul", x, weight))

    def norm(self, x, layer, name):
        epsilon = self.value(torch.tensor(layer.eps), f"{name}.epsilon")
        centred = self.op("Sub", x, self.op("ReduceMean", x, axes=[-1]))
        variance = self.op("ReduceMean", self.op("Mul", centred, centred), axes=[-1])
        normed = self.op("Div", centred, self.op("Sqrt", self.op("Add", variance, epsilon)))
        scaled = self.op("Mul", normed, self.value(layer.weight, f"{name}.weight"))
        return self.op("Add", scaled, self.value(layer.bias, f"{name}.bias"))

    def embedded(self, model):
        name, grid = "backbone.embeddings.patch_embeddings.projection", SIDE // 14
        convolution = (
            self.value(model.patch_embed.proj.weight, f"{name}.weight"),
            self.value(model.patch_embed.proj.bias, f"{name}.bias"),
        )
        x = self.op("Conv", "input_image", *convolution, strides=[14, 14])
        x = self.op("Transpose", self.shaped(x, 0, WIDTH, grid * grid), perm=[0, 2, 1])
        cls = self.op("Mul", self.value(model.cls_token, "backbone.embeddings.cls_token"), self.ones_of(x))
        x = self.op("Concat", cls, x, axis=1)
        first, rest = (
            self.value(part.contiguous(), f"pos_{part.shape[1]}") for part in model.pos_embed.split([1, grid**2], 1)
        )
        return self.op("Add", x, self.op("Concat", first, rest, axis=1, out=fetch.POSITION))

    def ones_of(self, x):
        """Ones [B, 1, 1]."""
        mean = self.op("ReduceMean", x, axes=[1, 2])
        return self.op("Add", self.op("Sub", mean, mean), self.value(torch.tensor(1.0), "one"))

    def block(self, x, block, name):
        y = self.norm(x, block.norm1, f"{name}norm1")
        weights, biases = (part.chunk(3) for part in (block.attn.qkv.weight, block.attn.qkv.bias))
        heads = {}
        for number, part in ((1, "key"), (2, "value"), (0, "query")):
            z = self.linear(y, (weights[number], biases[number]), f"{name}attention.attention.{part}")
            z = self.shaped(z, 0, 0, HEADS, WIDTH // HEADS)
            heads[part] = self.op("Transpose", z, perm=[0, 2, 3, 1] if part == "key" else [0, 2, 1, 3])
        scores = self.op("MatMul", heads["query"], heads["key"])
        scale = self.value(torch.tensor(float(WIDTH // HEADS) ** -0.5), f"{name}scale")
        mixed = self.op("MatMul", self.op("Softmax", self.op("Mul", scores, scale), axis=-1), heads["value"])
        mixed = self.shaped(self.op("Transpose", mixed, perm=[0, 2, 1, 3]), 0, 0, WIDTH)
        out = self.linear(mixed, (block.attn.proj.weight, block.attn.proj.bias), f"{name}attention.output.dense")
        x = self.op("Add", self.op("Mul", out, self.value(block.ls1.gamma, f"{name}layer_scale1.lambda1")), x)
        y = self.norm(x, block.norm2, f"{name}norm2")
        z = self.linear(y, (block.mlp.fc1.weight, block.mlp.fc1.bias), f"{name}mlp.fc1")
        half, root = (self.value(torch.tensor(number), f"{name}{number}") for number in (0.5, 2**-0.5))
        one = self.op("Add", self.op("Erf", self.op("Mul", z, root)), self.value(torch.tensor(1.0), f"{name}one"))
        z = self.op("Mul", self.op("Mul", z, one), half)
        out = self.linear(z, (block.mlp.fc2.weight, block.mlp.fc2.bias), f"{name}mlp.fc2")
        return self.op("Add", self.op("Mul", out, self.value(block.ls2.gamma, f"{name}layer_scale2.lambda1")), x)

    def saliency(self, tokens, decoder):
        grid = SIDE // 14
        ends = [self.value(torch.tensor([number]), name) for name, number in (("from", 1), ("to", 2**31), ("axis", 1))]
        x = self.op("Transpose", self.op("Slice", tokens, *ends), perm=[0, 2, 1])
        x = self.shaped(x, 0, WIDTH, grid, grid)
        weights = {name: value for name, value in decoder.state_dict().items() if "batches" not in name}
        named = {name: self.value(value, f"decoder.{name}") for name, value in weights.items()}
        for number in (1, 2, 3):
            up = (named[f"upconv{number}.{part}"] for part in ("weight", "bias"))
            x = self.op("ConvTranspose", x, *up, strides=[2, 2], pads=[1, 1, 1, 1])
            norm = (named[f"bn{number}.{part}"] for part in ("weight", "bias", "running_mean", "running_var"))
            x = self.op("Relu", self.op("BatchNormalization", x, *norm))
        x = self.op("Conv", x, named["final_conv.weight"], named["final_conv.bias"])
        scales = self.value(torch.tensor([1.0, 1.0, *[SIDE / (8 * grid)] * 2]), "scales")
        x = self.op("Resize", x, "", scales, mode="linear", coordinate_transformation_mode="half_pixel")
        self.op("Sigmoid", x, out="output_importance")

    def save(self, path):
        from onnx import save

        batch = self.helper.make_tensor_value_info
        graph = self.helper.make_graph(
            self.nodes,
            "main_graph",
            [batch("input_image", self.float32, ["batch", 3, SIDE, SIDE])],
            [batch("output_importance", self.float32, None)],
            self.values,
        )
        opset = [self.helper.make_opsetid("", 14)]
        save(self.helper.make_model(graph, opset_imports=opset, ir_version=8), str(path))
        return path
