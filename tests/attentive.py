"""Small networks with attention, as users have them: five classes, no dropout."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

TOKENS = torch.arange(24).reshape(4, 6) * 7 % 20
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Encoder(nn.Module):
    """Embeds tokens, or takes what is embedded, and classifies their mean."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.encoder = encoder
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if x.is_floating_point() else self.embedding(x)
        return self.head(self.encoder(x).mean(1))


class Logits(nn.Module):
    """Returns what a network of transformers says about classes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x).logits


class Cross(nn.Module):
    """Reads a memory of another width, without a residual stream."""

    def __init__(self, **settings) -> None:
        super().__init__()
        self.ask, self.memory = nn.Linear(12, 8), nn.Linear(12, 6)
        self.attention = nn.MultiheadAttention(8, 4, kdim=6, vdim=6, **settings)
        self.back = nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = self.memory(x)
        return self.back(self.attention(self.ask(x), memory, memory)[0])


def layer(**settings) -> nn.Module:
    return nn.TransformerEncoderLayer(
        12, 4, 16, **{"dropout": 0.0, "batch_first": True} | settings
    )


def stack(nested: bool = False, **settings) -> nn.Module:
    return Encoder(nn.TransformerEncoder(layer(**settings), 2, None, nested))


def transformers(kind: str, **settings) -> nn.Module:
    """Build a network of two layers, four heads of 3 channels and random weights."""
    library = pytest.importorskip("transformers")
    config = getattr(library, f"{kind}Config")(num_labels=5, **settings)
    image = "patch_size" in settings
    task = "ImageClassification" if image else "SequenceClassification"
    network = getattr(library, f"{kind}For{task}")(config)
    for path, module in list(network.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":  # it rounds to float32
            exact = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon)
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, exact)
    return Logits(network)


_SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
_TEXT = {"vocab_size": 20, "max_position_embeddings": 8, "pad_token_id": 19}


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 4, 2, 4, 12, 16, num_classes=5)


def _timm_vit() -> nn.Module:
    library = pytest.importorskip("timm", reason="needs the extra dev")
    sizes = {"embed_dim": 12, "depth": 2, "num_heads": 4, "mlp_ratio": 4 / 3}
    return library.models.VisionTransformer(16, 4, num_classes=5, **sizes)


def _swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    sizes = {"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4]}
    # 5 x 5 patches do not fill windows of 3 x 3: they are padded and shifted.
    return SwinTransformer(
        [3, 3], window_size=[3, 3], num_classes=5, stochastic_depth_prob=0.1, **sizes
    )


#: Name -> network and a batch that it takes.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "encoder": (stack, TOKENS),
    "norm-first": (lambda: stack(norm_first=True, activation="gelu"), TOKENS),
    "no-bias": (lambda: stack(bias=False), TOKENS),
    "cross": (lambda: Encoder(Cross(batch_first=True)), TOKENS),
    "vision-transformer": (_vit, IMAGES),
    "timm-vit": (_timm_vit, IMAGES),
    "swin": (_swin, IMAGES),
    "bert": (
        lambda: transformers(
            "Bert",
            hidden_size=12,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **_SIZES,
            **_TEXT,
        ),
        TOKENS,
    ),
    "distilbert": (
        lambda: transformers(
            "DistilBert",
            dim=12,
            n_layers=2,
            n_heads=4,
            hidden_dim=16,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            **_TEXT,
        ),
        TOKENS,
    ),
    "vit": (
        lambda: transformers(
            "ViT", hidden_size=12, image_size=16, patch_size=4, **_SIZES
        ),
        IMAGES,
    ),
    "gpt2": (
        lambda: transformers(
            "GPT2",
            n_embd=12,
            n_layer=2,
            n_head=4,
            n_inner=16,
            n_positions=8,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            vocab_size=20,
            pad_token_id=19,
            bos_token_id=0,
            eos_token_id=19,
        ),
        TOKENS,
    ),
    "llama": (
        lambda: transformers(
            "Llama", hidden_size=16, num_key_value_heads=2, **_SIZES, **_TEXT
        ),
        TOKENS,
    ),
}


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a network with weights that hide nothing, in float64, and a batch."""
    torch.manual_seed(0)
    make, x = NETWORKS[name]
    model = make()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.double(), x.double() if x.is_floating_point() else x
