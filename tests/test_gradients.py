"""Projected gradients against the for-loop of backwards."""

import gc
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from src.gradients import GradientCollector, outputs_of, products_with
from src.models import (
    LORA_TARGETS,
    OUTPUT_FUNCTIONS,
    BaseWeights,
    LanguageModel,
    LoraShape,
    load_model,
    per_sample_loss,
)
from src.projection import Directions, make_projection
from src.store import save_projection_signs
from tests.commands import COLLECT, TRAIN, load_script, refused, run_script
from tests.conftest import write_sources
from tests.test_models import KINDS, adapted, make_datamodule, of_peft


def oracle(model: LanguageModel, datamodule, indices: np.ndarray, output="loss") -> tuple[np.ndarray, np.ndarray]:
    """Gradients (len(indices), p) and outputs: a batch of one and a backward for each, flattened in layout order."""
    model.eval()
    gradients, outputs = [], []
    for index in indices:
        model.zero_grad()
        value = OUTPUT_FUNCTIONS[output].function(*model.target_logits(datamodule.collate([index])), 1)
        value.sum().backward()
        slopes = [(model.network.get_parameter(of.name).grad, of.transposed) for of in model.layout.matrices]
        flat = [(slope.T if transposed else slope).flatten() for slope, transposed in slopes]
        gradients.append(torch.cat(flat).clone())
        outputs.append(float(value.detach()))
    return torch.stack(gradients).numpy(), np.array(outputs)


def collected(model, datamodule, indices: np.ndarray, projection=None, output="loss", max_tokens=10_000):
    """Rows (len(indices), d) and outputs from the collector, in the order of `indices`; exact without a projection."""
    projection = projection or make_projection("none", None, 0, shapes=model.layout.shapes)
    rows, outputs = {}, {}
    with GradientCollector(model, projection, output) as collect:
        for batch in datamodule.evaluation_batches(indices, max_tokens):
            values, out = collect(batch)
            for position, index in enumerate(batch["sample_index"].tolist()):
                rows[index], outputs[index] = values[position].numpy(), float(out[position])
    return np.stack([rows[i] for i in indices]), np.array([outputs[i] for i in indices])


def assert_near(rows: np.ndarray, expected: np.ndarray) -> None:
    assert np.linalg.norm(rows - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(("kind", "output"), [*((kind, "loss") for kind in KINDS), ("llama", "margin")])
def test_products_with_directions_are_those_of_the_for_loop_gradients(kind, output, model_folders, tmp_path):
    model = adapted(model_folders[kind])
    datamodule, indices = make_datamodule(model, tmp_path), np.arange(14)[::-1]
    gradients, _ = oracle(model, datamodule, indices, output)
    random = torch.Generator().manual_seed(0)
    shapes = model.layout.shapes
    ways = [{name: torch.randn(shape, generator=random) for name, shape in shapes.items()} for _ in range(2)]
    flat = np.stack([torch.cat([way[name].flatten() for name in shapes]).numpy() for way in ways], axis=1)
    sign = -1 if output == "margin" else 1  # of what a store holds
    assert_near(products_with(model, datamodule, indices, output, ways), sign * gradients @ flat)
    together = Directions(ways).lift(torch.tensor([2.0, -1.0]), shapes)
    for name in shapes:
        torch.testing.assert_close(together[name], 2 * ways[0][name] - ways[1][name])


@pytest.mark.parametrize("output", ["loss", "margin"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_for_loop_gradients(kind, output, model_folders, tmp_path):
    """Exact gradients and each projection of them, for batches of one and of many rows of different length."""
    model = adapted(model_folders[kind])
    datamodule, indices = make_datamodule(model, tmp_path), np.arange(14)
    gradients, expected = oracle(model, datamodule, indices, output)
    for max_tokens in (1, 150, 10_000):
        rows, outputs = collected(model, datamodule, indices, None, output, max_tokens)
        np.testing.assert_allclose(outputs, expected, rtol=1e-5)
        assert_near(rows, gradients)
    for projection_kind in ("sketch", "two_sided", "dense"):
        projection = make_projection(projection_kind, 48, 3)
        rows, _ = collected(model, datamodule, indices, projection, output, 150)
        # the adjoint of lift is the projection: column j of P^T g is <g, P e_j>
        lifted = (projection.lift(unit, model.layout.shapes).values() for unit in torch.eye(projection.dim))
        columns = [torch.cat([matrix.flatten() for matrix in matrices]) for matrices in lifted]
        assert_near(rows, gradients @ torch.stack(columns, dim=1).numpy())
    save_projection_signs(tmp_path / "signs.npz", projection, model.layout.shapes)  # the dense one, unpacked by hand
    with np.load(tmp_path / "signs.npz") as signs:
        bits = np.concatenate([np.unpackbits(signs[name], axis=1)[:, :48] for name in model.layout.shapes])
    np.testing.assert_allclose(rows, gradients @ (2.0 * bits - 1) / np.sqrt(48), rtol=1e-4, atol=1e-5)


SITES = [
    ("llama", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj", {"q_proj": 2, "down_proj": 7}),
    ("llama", "o_proj", {}),
    ("t5", "q v wi wo", {"wi": 3}),
    ("gpt2", "c_attn c_proj c_fc", {"c_fc": 1}),
]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("kind", "layers", "ranks"), SITES)
def test_any_layers_ranks_and_checkpointing(kind, layers, ranks, checkpointed, model_folders, tmp_path):
    """The rows are the for-loop's wherever LoRA sits, with recomputed activations or kept ones."""
    options = {"target_modules": layers.split(), "rank_pattern": ranks, "fan_in_fan_out": kind == "gpt2"}
    model = of_peft(model_folders[kind], task_type=None, **options)
    datamodule, indices, forwards = make_datamodule(model, tmp_path), np.arange(6), []
    gradients, expected = oracle(model, datamodule, indices)
    first = next(module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    norm = next(module for name, module in first.named_modules() if "norm" in name or "ln_" in name)
    norm.register_forward_hook(lambda *_: forwards.append(1))
    if checkpointed:
        model.checkpoint_activations()
    rows, outputs = collected(model, datamodule, indices)
    assert_near(rows, gradients)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5)
    assert len(forwards) == 1 + checkpointed  # one batch: checkpointing runs the layer again in the backward
    assert not any(module.training for module in model.modules())


LAYOUTS = "llama t5 t5-untied gpt2 gemma gemma2 gemma3_text qwen2 qwen3 mistral opt gpt_neox"


@pytest.mark.parametrize("kind", LAYOUTS.split())
def test_every_known_architecture(kind, model_folders, tmp_path):
    """An adapter sits where `LORA_TARGETS` says; without one the rows are the for-loop's of every linear layer."""
    model = adapted(model_folders[kind])
    targets = LORA_TARGETS[model.network.config.model_type]
    assert {matrix.module_name.split(".")[-3] for matrix in model.layout.matrices} == set(targets)
    model = load_model(model_folders[kind], None).eval()
    datamodule = make_datamodule(model, tmp_path)
    assert_near(collected(model, datamodule, np.arange(5))[0], oracle(model, datamodule, np.arange(5))[0])
    assert len(model.layout.matrices) >= 2 * 4  # two blocks of attention and feed-forward
    # an output layer of its own is in the layout, one tied to the embedding is not
    assert ("lm_head.weight" in model.layout.shapes) == (not model.network.config.tie_word_embeddings)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_base(kind, model_folders, tmp_path):
    """A base in bfloat16 under a float32 adapter: rows are float32, near the for-loop's own and a float32 base's."""
    own, exact = rows_with_base(model_folders[kind], BaseWeights("bfloat16"), tmp_path)
    assert own.min() > 0.99  # other order of sums, in half precision
    assert exact.min() > 0.98


def rows_with_base(folder: str, weights: BaseWeights, tmp_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of six rows of a model with such a base: with the for-loop's gradients, and with a float32 base's rows."""
    lora = LoraShape(rank=4, alpha=8)
    model = load_model(folder, lora, weights=weights).eval()
    full = load_model(folder, lora).eval()
    torch.manual_seed(0)
    adapter = {name: torch.randn_like(value) * 0.1 for name, value in full.trainable_state().items()}
    model.load_trainable_state(adapter), full.load_trainable_state(adapter)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
    assert any(parameter.dtype in (torch.bfloat16, torch.uint8) for parameter in model.parameters())
    datamodule, indices = make_datamodule(model, tmp_path), np.arange(6)
    outputs_of(model, datamodule, indices, "loss")  # an evaluation before changes nothing
    takes = ((collected, model), (oracle, model), (collected, full))
    rows, own, exact = (take(one, datamodule, indices)[0] for take, one in takes)

    def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)

    return cosines(rows, own), cosines(rows, exact)


@pytest.mark.parametrize("lora", [LoraShape(4, 8), None])
def test_checkpointing_lets_layer_inputs_go(lora, model_folders, tmp_path, monkeypatch):
    """Between forward and backward, tensors that Python or the graph holds: a small share of what they are without."""
    model = load_model(model_folders["llama"], lora)
    batch = make_datamodule(model, tmp_path).collate(np.arange(20))
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def kept():
        """Bytes, without weights and logits."""
        held: dict[int, int] = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor

        def output(logits, *others):
            gc.collect()
            before = {id(tensor) for tensor in earlier}
            for found in gc.get_objects():
                if type(found) is torch.Tensor and id(found) not in before:
                    note(found)
            held.pop(logits.untyped_storage().data_ptr(), None)
            return loss(logits, *others)

        loss = OUTPUT_FUNCTIONS["loss"].function
        earlier = [found for found in gc.get_objects() if type(found) is torch.Tensor]
        with GradientCollector(model, make_projection("sketch", 16, 0)) as collect:
            collect.output_function = OUTPUT_FUNCTIONS["loss"]._replace(function=output)
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                collect(batch)
        return sum(size for pointer, size in held.items() if pointer not in weights)

    whole = kept()
    model.checkpoint_activations()
    assert kept() < 0.2 * whole


def test_dropout_stays_off_under_checkpointing(model_folders, tmp_path):
    """Adapter and layers with dropout: the same rows twice, and the mode of every module comes back."""
    model = adapted(model_folders["gpt2"]).checkpoint_activations().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    batch = make_datamodule(model, tmp_path).collate([0, 1, 2])
    with GradientCollector(model, make_projection("sketch", 16, 0)) as collect:
        first, second = collect(batch)[0], collect(batch)[0]
    torch.testing.assert_close(first, second)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_stays_near_float32(kind, model_folders, tmp_path):
    """Half precision costs digits (8 bits of mantissa, some layers deep), not direction; rows stay float32."""
    model = adapted(model_folders[kind])
    batch = make_datamodule(model, tmp_path).collate(np.arange(8))
    projection = make_projection("none", None, 0, shapes=model.layout.shapes)
    with GradientCollector(model, projection) as collect:
        exact, _ = collect(batch)
    with GradientCollector(model, projection, autocast="bfloat16") as collect:
        rounded, _ = collect(batch)
    assert rounded.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, rounded).min() > 0.99
    assert not torch.equal(exact, rounded)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_same_rows(kind, model_folders, tmp_path):
    """The projections' numbers do not depend on the device, so neither do the rows."""
    model = adapted(model_folders[kind])
    datamodule = make_datamodule(model, tmp_path)
    for name in ("sketch", "two_sided", "dense"):
        on_cpu, _ = collected(model.cpu(), datamodule, np.arange(8), make_projection(name, 48, 3))
        with GradientCollector(model.cuda(), make_projection(name, 48, 3)) as collect:
            on_gpu, _ = collect(datamodule.collate(np.arange(8)))
        torch.testing.assert_close(on_gpu.cpu(), torch.from_numpy(on_cpu), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_representations_do_not_depend_on_the_batch(kind, model_folders, tmp_path):
    """Position-weighted means of the last hidden states, from transformers' own output, a sample at a time."""
    model = adapted(model_folders[kind])
    datamodule = make_datamodule(model, tmp_path)
    projection = make_projection("sketch", 8, 0)
    indices = np.arange(10)
    with GradientCollector(model, projection, represent=True) as collect:
        collect(datamodule.collate(indices))
        together = collect.representations.numpy()
        if model.kind == "decoder":
            collect(datamodule.collate(indices, pad_left=True))
            np.testing.assert_allclose(collect.representations.numpy(), together, atol=1e-5)
    for index, found in zip(indices, together, strict=True):
        batch = datamodule.collate([index])
        del batch["sample_index"]
        with torch.no_grad():
            output = model.network(**batch, output_hidden_states=True)
        states = output.hidden_states if model.kind == "decoder" else output.decoder_hidden_states
        last = states[-1][0] * (model.network.config.d_model**-0.5 if kind == "t5" else 1)  # T5 scales tied outputs
        mean = np.average(last.numpy(), axis=0, weights=np.arange(1, len(last) + 1))
        np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-5)


def test_collector_leaves_the_model_as_it_was(model_folders, tmp_path):
    model = adapted(model_folders["llama"]).train()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    datamodule = make_datamodule(model, tmp_path)
    with GradientCollector(model, make_projection("sketch", 16, 0)) as collect:
        collect(datamodule.collate([0, 1]))
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_batch_of_gradients_waits_for_a_gpu_no_more_than_the_model_itself(kind, model_folders, tmp_path):
    """Nothing is looked up on the device but by transformers, which looks at the mask; a training step likewise."""
    model, count = adapted(model_folders[kind]), load_script("scripts/benchmark_gradients.py").count_kernels
    batch = make_datamodule(model, tmp_path).collate(np.arange(20))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels") if name in batch}
    _, own = count(lambda: model.network(**inputs, use_cache=False))
    batch |= {"targets": model.targets(batch)}
    with GradientCollector(model, make_projection("sketch", 16, 0)) as collect:
        assert count(lambda: collect(batch))[1] <= own
    assert count(lambda: per_sample_loss(*model.target_logits(batch), 20).mean().backward())[1] <= own
    del batch["targets"]
    assert count(lambda: model.target_logits(batch))[1] > own


needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="see requirements-qlora.txt")


def test_four_bits_need_bitsandbytes(model_folders, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    weights = BaseWeights(four_bit_device="cpu")
    message = "--use_qlora: bitsandbytes is not installed; pip install -r requirements-qlora"
    refused(message, load_model, model_folders["llama"], LoraShape(4, 8), weights=weights)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["llama", "llama-wide"])
def test_gradients_on_a_four_bit_base(kind, model_folders, tmp_path):
    """Layers narrower than a block of 64 numbers too; an evaluation before takes no gradient away."""
    own, exact = rows_with_base(model_folders[kind], BaseWeights(four_bit_device="cpu"), tmp_path)
    assert own.min() > 0.99 and exact.min() > 0.5


@needs_bitsandbytes
def test_four_bit_stages(model_folders, workspace):
    """Training and gradients on a 4-bit base; 4 bits without an adapter are refused."""
    write_sources("sources.jsonl", {"up": 20, "down": 20})
    training = f"{TRAIN} --data_files sources.jsonl --model_key {model_folders['llama-wide']} --lora_rank 4 --use_qlora"
    run_script(f"{training} --train_lora --epochs 2 --batch_size 8 --checkpoint_at 1.0")
    run_script(*COLLECT, "--project_dim", "24")
    (rows,) = Path("gradients").glob("*/*/projected.npy")
    assert np.isfinite(np.load(rows)).all()
    refused(r"--use_qlora is for a base model that stays as it is.*--train_lora", run_script, f"{training} --epochs 1")
