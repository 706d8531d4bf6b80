"""A fine-tune goes wherever a MACE model goes: ASE, MACE's own tools, TorchScript, LAMMPS."""

import subprocess
import sys

import ase.io
import numpy as np
import pytest
import torch
from ase.build import molecule
from mace.calculators import MACECalculator
from mace.cli import convert_device, create_lammps_model, eval_configs, select_head
from mace.tools.scripts_utils import extract_model, remove_pt_head
from runs import environment, process_state_restored
from test_load import randomise, same
from tiny import batch, configurations, predict, tiny_mace

from mace_peft import (
    PeftConfig,
    PeftError,
    calculator,
    cli,
    deploy,
    disable_adapter,
    eject,
    inject,
    load_adapter,
    save_adapter,
)
from mace_peft.backbones.foundation import rebuild
from mace_peft.deploy import export
from mace_peft.model.adapted import fingerprint, is_adapted

STRUCTURES = configurations(2)
PERIODIC = configurations(1, periodic=True)
CASES = [("mmea", "products"), ("mmea", "published"), ("elora", "published")]
NON_LINEAR = "RealAgnosticResidualNonLinearInteractionBlock"
FORMATS = ["model", "torchscript", "lammps", "lammps-mliap"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Foundation of H, C, N, O, adapters that were trained without N, every file that they export to, and a structure.
    """
    folder = tmp_path_factory.mktemp("deploy")
    ase.io.write(folder / "structure.xyz", STRUCTURES[0])
    foundation = tiny_mace(elements=(1, 6, 7, 8))
    torch.save(foundation, folder / "foundation.model")
    origin = {"name": "foundation.model", "head": None, "fingerprint": fingerprint(foundation)}
    for method, targets in CASES:
        narrowed = rebuild(tiny_mace(elements=(1, 6, 7, 8)), [1, 6, 8], ["Default"], [[-13.0, -1000.0, -2000.0]])
        adapter = folder / f"{method}-{targets}"
        save_adapter(randomise(inject(narrowed, PeftConfig(method, rank=2, targets=targets), origin)), adapter)
        for format in FORMATS:
            export(str(folder / "foundation.model"), str(adapter), f"{adapter}.{format}", format)
    return folder


def trained(folder, case, structures=STRUCTURES):
    """Energies (eV) and forces (eV/A) of the trained model."""
    model = load_adapter(tiny_mace(elements=(1, 6, 7, 8)), folder / "-".join(case))
    return predict(model, structures)


def file(folder, case, format):
    return folder / f"{'-'.join(case)}.{format}"


over_cases = pytest.mark.parametrize("case", CASES, ids="-".join)


# --- ASE --------------------------------------------------------------------------------------------------------------


@over_cases
def test_the_calculator_gives_the_trained_model(folder, case):
    model = load_adapter(tiny_mace(elements=(1, 6, 7, 8)), folder / "-".join(case))
    expected = model(batch(model, PERIODIC), compute_stress=True)
    atoms = PERIODIC[0].copy()
    atoms.calc = calculator(folder / "foundation.model", folder / "-".join(case), device="cpu")
    assert isinstance(atoms.calc, MACECalculator)
    assert atoms.get_potential_energy() == pytest.approx(expected["energy"].item(), rel=1e-10)
    assert np.allclose(atoms.get_forces(), expected["forces"].detach(), rtol=1e-10, atol=1e-10)
    assert np.allclose(atoms.get_stress(voigt=False), expected["stress"][0].detach(), rtol=1e-10, atol=1e-12)


def test_the_calculator_takes_a_model_and_leaves_it_alone(folder):
    foundation = tiny_mace(elements=(1, 6, 7, 8))
    before = fingerprint(foundation)
    atoms = STRUCTURES[0].copy()
    atoms.calc = calculator(foundation, folder / "mmea-products", default_dtype="float32")
    assert atoms.get_potential_energy() == pytest.approx(trained(folder, CASES[0])[0][0].item(), rel=1e-5)
    assert not is_adapted(foundation) and fingerprint(foundation) == before
    assert foundation.r_max.dtype == torch.float64


def test_a_float32_foundation_gives_the_numbers_of_a_float64_training(tmp_path):
    """MACE narrows the elements of a float32 file in the dtype of the run; so does who loads the adapter."""
    foundation = tiny_mace(elements=(1, 6, 7, 8), dtype=torch.float32)
    torch.save(foundation, tmp_path / "foundation.model")
    origin = {"name": "foundation.model", "head": None, "fingerprint": fingerprint(foundation)}
    narrowed = rebuild(foundation.double(), [1, 8], ["Default"], [[-13.1, -2000.3]])
    model = randomise(inject(narrowed, PeftConfig("mmea", rank=2, targets="products"), origin))
    save_adapter(model, tmp_path / "adapter")
    atoms = configurations(1, "H2O")
    expected = predict(model, atoms)
    atoms[0].calc = calculator(tmp_path / "foundation.model", tmp_path / "adapter")
    assert atoms[0].get_potential_energy() == pytest.approx(expected[0].item(), rel=1e-12)
    assert np.allclose(atoms[0].get_forces(), expected[1], rtol=1e-10, atol=1e-12)


def test_the_calculator_refuses_an_element_that_the_adapter_has_never_seen(folder):
    atoms = molecule("NH3")
    atoms.calc = calculator(folder / "foundation.model", folder / "mmea-products")
    with pytest.raises(PeftError, match="the structure has N, and the adapter was trained for H C O"):
        atoms.get_potential_energy()


# --- MACE's own tools -------------------------------------------------------------------------------------------------


@over_cases
def test_mace_eval_configs_runs_it(folder, case, tmp_path, monkeypatch):
    ase.io.write(tmp_path / "in.xyz", STRUCTURES)
    model = file(folder, case, "model")
    monkeypatch.setattr(sys, "argv", ["mace_eval_configs", f"--configs={tmp_path / 'in.xyz'}", f"--model={model}",
                                      f"--output={tmp_path / 'out.xyz'}"])
    with process_state_restored():
        eval_configs.main()
    energies, forces = trained(folder, case)
    evaluated = ase.io.read(tmp_path / "out.xyz", ":")
    assert [atoms.info["MACE_energy"] for atoms in evaluated] == pytest.approx(energies.tolist(), rel=1e-9)
    assert np.allclose(np.concatenate([atoms.arrays["MACE_forces"] for atoms in evaluated]), forces, atol=1e-7)  # text


@over_cases
def test_mace_create_lammps_model_gives_the_same_energies_and_forces(folder, case, tmp_path, monkeypatch):
    model = tmp_path / "trained.model"
    model.write_bytes(file(folder, case, "model").read_bytes())
    monkeypatch.setattr(sys, "argv", ["mace_create_lammps_model", str(model)])
    create_lammps_model.main()
    assert same(lammps(tmp_path / "trained.model-lammps.pt", folder, case), trained(folder, case, STRUCTURES[:1]))


def test_mace_create_lammps_model_gives_the_same_for_mliap(tmp_path, monkeypatch):
    """On cuEquivariance, to which the gates go with the model."""
    model = randomise(inject(tiny_mace(max_ell=1), PeftConfig("mmea", rank=2, targets="products")))
    torch.save(model, tmp_path / "trained.model")
    monkeypatch.setattr(sys, "argv", ["mace_create_lammps_model", "--format=mliap", str(tmp_path / "trained.model")])
    with process_state_restored():
        create_lammps_model.main()
    data = Neighbours(model, STRUCTURES[0])
    torch.load(tmp_path / "trained.model-mliap_lammps.pt", weights_only=False).compute_forces(data)
    energy, forces = predict(model, STRUCTURES[:1])
    assert float(data.energy) == pytest.approx(energy.item(), rel=1e-7)
    assert np.allclose(data.forces, forces, rtol=1e-6, atol=1e-7)


def lammps(path, folder, case):
    """Energy and forces of one structure from a model for ``pair_style mace``; every atom is local."""
    model = load_adapter(tiny_mace(elements=(1, 6, 7, 8)), folder / "-".join(case))
    data = batch(model, STRUCTURES[:1])
    output = torch.jit.load(path)(data, torch.ones(len(STRUCTURES[0]), dtype=torch.float64))
    return output["total_energy_local"].detach(), output["forces"]


@over_cases
def test_the_export_for_lammps_gives_the_same_energies_and_forces(folder, case):
    assert same(lammps(file(folder, case, "lammps"), folder, case), trained(folder, case, STRUCTURES[:1]))


class Neighbours:
    """What LAMMPS hands to an ``mliap unified`` model: here for a molecule in one process, without ghost atoms."""

    def __init__(self, model, atoms):
        data = batch(model, [atoms])
        self.pair_j, self.pair_i = data["edge_index"].numpy()
        self.rij = atoms.positions[self.pair_j] - atoms.positions[self.pair_i]
        self.elems = np.array([model.atomic_numbers.tolist().index(number) for number in atoms.numbers])
        self.nlocal = self.ntotal = len(atoms)
        self.npairs = len(self.pair_i)
        self.eatoms = np.zeros(len(atoms))
        self.forces = np.zeros((len(atoms), 3))

    def forward_exchange(self, features, out, size):
        out.copy_(features)

    reverse_exchange = forward_exchange

    def update_pair_forces_gpu(self, forces):
        np.add.at(self.forces, self.pair_i, forces.detach().numpy())
        np.add.at(self.forces, self.pair_j, -forces.detach().numpy())


@over_cases
def test_the_export_for_mliap_gives_the_same_energies_and_forces(folder, case):
    model = load_adapter(tiny_mace(elements=(1, 6, 7, 8)), folder / "-".join(case))
    data = Neighbours(model, STRUCTURES[0])
    torch.load(file(folder, case, "lammps-mliap"), weights_only=False).compute_forces(data)
    energy, forces = trained(folder, case, STRUCTURES[:1])
    assert float(data.energy) == pytest.approx(energy.item(), rel=1e-10)
    assert np.allclose(data.forces, forces, rtol=1e-9, atol=1e-10)


WITHOUT_MACE_PEFT = """
import sys
sys.modules["mace_peft"] = None  # an import of it fails
import ase.io, mace, torch
from mace.calculators import MACECalculator
atoms = ase.io.read("structure.xyz")
for name in sys.argv[1:]:
    if name.endswith(".lammps"):
        torch.jit.load(name)
        continue
    atoms.calc = MACECalculator(name, device="cpu", default_dtype="float64")
    print(name, repr(float(atoms.get_potential_energy())), repr(float(atoms.get_forces()[1, 2])))
"""


def test_without_mace_peft_merged_models_and_torchscript_load_and_predict(folder):
    names = ["elora-published.model", *(f"{'-'.join(case)}.{format}" for case in CASES
                                        for format in ("torchscript", "lammps"))]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_MACE_PEFT, *names], cwd=folder,
                          env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = [line.split() for line in done.stdout.splitlines() if line.split()[:1] and line.split()[0] in names]
    assert len(printed) == 4
    for name, energy, force in printed:
        case = tuple(name.partition(".")[0].split("-"))
        energies, forces = trained(folder, case, [ase.io.read(folder / "structure.xyz")])
        assert float(energy) == pytest.approx(energies.item(), rel=1e-10)
        assert float(force) == pytest.approx(forces[1, 2].item(), rel=1e-10, abs=1e-10)


def test_without_mace_peft_an_mmea_model_says_what_is_missing(folder):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_MACE_PEFT, "mmea-products.model"], cwd=folder,
                          env=environment(), capture_output=True, text=True)
    assert done.returncode != 0 and "mace_peft" in done.stderr


@over_cases
def test_mace_convert_device_keeps_it(folder, case, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mace_convert_device", "-t", "cpu", "-o", str(tmp_path / "converted.model"),
                                      str(file(folder, case, "model"))])
    convert_device.main()
    converted = torch.load(tmp_path / "converted.model", weights_only=False)
    assert same(predict(converted, STRUCTURES), trained(folder, case))


# --- where MACE rebuilds a model --------------------------------------------------------------------------------------


@over_cases
def test_a_copy_that_mace_makes_has_the_adapters(folder, case):
    """``extract_model`` rebuilds a model for ``MACECalculator(compile_mode=...)``."""
    model = load_adapter(tiny_mace(elements=(1, 6, 7, 8)), folder / "-".join(case))
    with process_state_restored():
        torch.set_default_dtype(torch.float64)
        twin = extract_model(model)
    assert is_adapted(twin) and twin.peft_config == model.peft_config
    assert same(predict(twin, STRUCTURES), predict(model, STRUCTURES))


def two_heads(config):
    return randomise(inject(tiny_mace(heads=("pt_head", "mine")), config))


@pytest.mark.parametrize("config", [PeftConfig("mmea", rank=2, targets="products"),
                                    PeftConfig("mmea", rank=2, targets="products", train_also="readouts.*"),
                                    PeftConfig("elora", rank=2, targets="products.*,interactions.*")], ids=str)
def test_removing_a_head_keeps_the_adapters(config):
    model = two_heads(config)
    with process_state_restored():
        torch.set_default_dtype(torch.float64)
        single = remove_pt_head(model, "mine")
    structures = configurations(2)
    for atoms in structures:
        atoms.info["head"] = "mine"
    assert single.heads == ["mine"] and is_adapted(single)
    assert same(predict(single, structures), predict(model, structures))


def test_mace_select_head_keeps_the_adapters(tmp_path, monkeypatch):
    model = two_heads(PeftConfig("mmea", rank=2, targets="products"))
    torch.save(model, tmp_path / "two.model")
    monkeypatch.setattr(sys, "argv", ["mace_select_head", "-n", "mine", "-o", str(tmp_path / "one.model"),
                                      str(tmp_path / "two.model")])
    with process_state_restored():
        select_head.main()
    structures = configurations(2)
    for atoms in structures:
        atoms.info["head"] = "mine"
    single = torch.load(tmp_path / "one.model", weights_only=False)
    assert same(predict(single, structures), predict(model, structures))


def test_removing_a_head_from_adapted_readouts_is_refused():
    with pytest.raises(PeftError, match="readouts.0.linear.adapter") as error:
        remove_pt_head(two_heads(PeftConfig("mmea", rank=2, targets="linears")), "mine")
    assert "\n" not in str(error.value)


def test_what_a_rebuilt_model_does_not_know_is_not_made_up():
    """The readouts before the training do not go through a rebuild, so the base cannot be had from it."""
    single = remove_pt_head(two_heads(PeftConfig("mmea", rank=2, targets="products", train_also="readouts.*")), "mine")
    for attempt in (eject, fingerprint, lambda model: disable_adapter(model).__enter__()):
        with pytest.raises(PeftError, match="readouts.0.linear.weight trained along"):
            attempt(single)


# --- the export's own refusals ----------------------------------------------------------------------------------------


def test_a_head_is_chosen_for_lammps(tmp_path):
    torch.save(tiny_mace(heads=("pt_head", "mine")), tmp_path / "foundation.model")
    save_adapter(two_heads(PeftConfig("mmea", rank=2, targets="products")), tmp_path / "adapter")
    arguments = (str(tmp_path / "foundation.model"), str(tmp_path / "adapter"), str(tmp_path / "out"))
    with pytest.raises(PeftError, match="heads pt_head, mine.*add head"):
        export(*arguments, "lammps")
    with pytest.raises(PeftError, match="^head 'min' is none of pt_head, mine, did you mean mine"):
        export(*arguments, "lammps", "min")
    with pytest.raises(PeftError, match="^head mine has no effect"):
        export(*arguments, "model", "mine")
    assert [path.name for path in tmp_path.glob("*out*")] == []
    export(*arguments, "lammps", "pt_head")
    assert torch.jit.load(tmp_path / "out").head.item() == 0


def test_an_export_does_not_replace_the_foundation(folder):
    path = str(folder / "foundation.model")
    before = (folder / "foundation.model").read_bytes()
    with pytest.raises(PeftError, match="is the foundation"):
        export(path, str(folder / "mmea-products"), path, "model")
    assert (folder / "foundation.model").read_bytes() == before


def test_the_command_knows_every_format():
    assert cli.FORMATS == tuple(deploy.FORMATS)


def test_a_dtype_that_torch_has_no_model_for_is_refused(folder):
    with pytest.raises(PeftError, match="default_dtype 'float65' is unknown"):
        calculator(folder / "foundation.model", folder / "mmea-products", default_dtype="float65")


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_that_fails_leaves_no_file(folder, tmp_path, small_files, format):
    with pytest.raises(PeftError, match=r"out cannot be written \(File too large\): make room or give .* place$"):
        export(str(folder / "foundation.model"), str(folder / "mmea-products"), str(tmp_path / "out"), format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.since("0.3.16")  # before, that block compiles
@pytest.mark.parametrize("format", ["torchscript", "lammps"])
def test_a_model_that_torchscript_does_not_compile_is_refused(tmp_path, format):
    foundation = tiny_mace(first=NON_LINEAR, later=NON_LINEAR)
    torch.save(foundation, tmp_path / "foundation.model")
    save_adapter(inject(foundation, PeftConfig("elora", rank=2, targets="products")), tmp_path / "adapter")
    with pytest.raises(PeftError, match=f"--format {format} cannot be made, .*: use model or lammps-mliap") as error:
        export(str(tmp_path / "foundation.model"), str(tmp_path / "adapter"), str(tmp_path / "out"), format)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_places_that_take_no_file_are_refused(folder, tmp_path):
    with pytest.raises(PeftError, match="no does not exist"):
        export(str(folder / "foundation.model"), str(folder / "mmea-products"), str(tmp_path / "no" / "out"), "model")
