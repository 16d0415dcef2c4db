from deltatune.cli import main


def test_verify_a_checkpoint(capsys, checkpoint) -> None:
    assert main(["verify", str(checkpoint), "--lengths", "5,1,9"]) == 0
    page = capsys.readouterr().out
    assert "linear_attention" in page
    assert "5, 1, 9" in page


def test_the_stock_model_leaks(capsys, checkpoint) -> None:
    assert main(["verify", str(checkpoint), "--lengths", "5,1,9", "--stock"]) == 1
    assert "LEAK" in capsys.readouterr().out


def test_a_tolerance_nothing_can_hold(capsys, checkpoint) -> None:
    assert main(["verify", str(checkpoint), "--lengths", "5,9", "--tolerance", "1e-30"]) == 1
