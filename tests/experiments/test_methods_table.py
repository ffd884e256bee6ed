"""`python -m experiments.methods`: its table, and that every column is held by a test over every method."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from experiments.methods import CONTRACT, MEANINGS, main, table
from experiments.plan.compose import options
from tests.experiments.train import test_methods as contract
from tests.experiments.train import test_sharding as processes

CHECKED_BY: dict[str, Callable[..., None]] = {
    "Starts at base": contract.test_attaching_changes_no_output_where_the_contract_says_so,
    "Merges": contract.test_a_run_is_scored_merged_where_the_contract_says_so,
    "Changes base": contract.test_the_base_changes_at_the_start_only_where_the_contract_says_so,
    "Checkpointing": contract.test_gradients_under_checkpointing_are_the_same,
    "Quantised base": contract.test_other_methods_are_refused_on_a_quantised_base,
    "DDP": processes.test_every_method_over_two_processes,
    "FSDP2": processes.test_every_method_over_two_processes,
    "Compile": contract.test_the_compiled_model_has_the_same_gradients_where_the_contract_says_so,
    "In place": contract.test_the_table_says_which_methods_train_in_place,
    "Dropout": contract.test_the_table_says_which_methods_have_dropout,
    "Needs rows": contract.test_the_table_says_which_methods_need_rows_or_another_run,
    "Needs run": contract.test_the_table_says_which_methods_need_rows_or_another_run,
}


def test_every_column_has_a_meaning_and_a_test() -> None:
    (columns,) = {tuple(row)[1:] for row in table()}
    assert set(columns) == set(MEANINGS) == set(CHECKED_BY)
    assert set(CONTRACT.values()) == contract.every_contract | contract.every_exception


def test_the_command_prints_a_line_for_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    header, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == options("method")
    merges = header.index("Merges")
    told = {line.split()[0]: line[merges:].split()[0] for line in lines}
    assert told == {name: "yes" if contract.contract_of(name)["merges"] else "no" for name in options("method")}


@pytest.mark.parametrize("name", options("method"))
def test_a_contract_names_no_other_field(name: str) -> None:
    assert contract.contract_of(name).keys() <= set(CONTRACT.values())
