from hasten.jobs.common.markdown import table


def test_a_table_has_a_rule_under_its_head():
    assert table(["a", "b"], [["x", "1"]]).splitlines() == ["| a | b |", "| :-- | --: |", "| x | 1 |"]
