"""The loops of HuggingFace, PEFT and Lightning themselves, on random weights."""

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from inprocess import LocalGrid, run, samples, seeded
from torch import nn
from torch.nn import functional

from autoflip_flwr import AutoFLIP, AutoFlipMod, masked

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NODES = [11, 12]


def bert():
    transformers = pytest.importorskip("transformers", reason="needs the extra dev")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return seeded(lambda: transformers.BertForSequenceClassification(config))


def sentences(partition_id):
    generator = torch.Generator().manual_seed(partition_id)
    ids = torch.randint(3, 40, (16, 8), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


def trainer(model, partition_id, folder):
    """HuggingFace's: AdamW in two groups, decayed matrices and the rest."""
    pytest.importorskip("accelerate", reason="needs the extra dev")
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=sentences(partition_id)
    )


def app_of(make, load, state, train):
    app = ClientApp(mods=[AutoFlipMod()])

    @app.train()
    def handle(message, context):
        model = make()
        load(model, message.content["arrays"].to_torch_state_dict())
        train(model, int(context.node_config["partition-id"]), message)
        content = {
            "arrays": ArrayRecord(state(model)),
            "metrics": MetricRecord({"num-examples": 16}),
        }
        return Message(RecordDict(content), reply_to=message)

    return app


def check(app, initial, **options):
    """Two rounds in which nothing pruned comes back; return what travelled."""
    grid = LocalGrid(app, NODES)
    strategy = AutoFLIP(FedAvg(fraction_evaluate=0), threshold=0.5, **options)

    class Initial:
        state_dict = staticmethod(lambda: initial)

    seen, _ = run(strategy, grid, Initial(), 2)
    replies = [sent for sent in grid.up if sent.phase == "train"]
    assert len(replies) == 2 * len(NODES)
    assert not [sent for sent in replies if "autoflip.moved" in sent.arrays]
    assert strategy.rounds.pruned > 0
    assert any((seen[-1][n] != seen[0][n]).any() for n in seen[0])
    return grid


@pytest.mark.parametrize("use_masked", [False, True])
def test_the_trainer_of_huggingface(use_masked, tmp_path):
    def train(model, partition_id, message):
        with masked(model, message if use_masked else {}):
            trainer(model, partition_id, tmp_path).train()

    def load(model, state):
        model.load_state_dict(state)

    app = app_of(bert, load, nn.Module.state_dict, train)
    check(app, bert().state_dict(), model=bert())


@pytest.mark.parametrize("use_masked", [False, True])
def test_lora_adapters_of_peft(use_masked, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra dev")
    config = peft.LoraConfig(
        r=4, target_modules=["query", "value"], init_lora_weights=False
    )

    def make():
        return seeded(lambda: peft.get_peft_model(bert(), config))

    def train(model, partition_id, message):
        with masked(model, message if use_masked else {}):
            trainer(model, partition_id, tmp_path).train()

    app = app_of(
        make,
        peft.set_peft_model_state_dict,
        peft.get_peft_model_state_dict,
        train,
    )
    initial = peft.get_peft_model_state_dict(make())
    grid = check(app, initial)
    frozen = {n for n, p in make().named_parameters() if not p.requires_grad}
    names = {n for sent in grid.down for n in sent.arrays} - {"autoflip.values"}
    assert len(names) == 8, "two matrices for query and value in two layers"
    assert not names & frozen
    assert all("lora_" in name for name in names)


@pytest.mark.parametrize("use_masked", [False, True])
def test_the_trainer_of_lightning(use_masked, tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs the extra dev")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
            self.head = nn.Linear(16, 3)

        def training_step(self, batch, number):
            x, y = batch
            return functional.cross_entropy(self.head(self.encoder(x)), y)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.05)

    def train(model, partition_id, message):
        data = torch.utils.data.TensorDataset(*samples(partition_id))
        loop = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(tmp_path),
        )
        with masked(model, message if use_masked else {}):
            loop.fit(model, torch.utils.data.DataLoader(data, batch_size=8))

    def make():
        return seeded(Module)

    def load(model, state):
        model.load_state_dict(state)

    check(app_of(make, load, nn.Module.state_dict, train), make().state_dict())
