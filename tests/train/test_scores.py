"""What guessing would score."""

from eagle_train.train.scores import chance


def test_chance_is_the_commonest_answer_or_a_guess_among_those_the_question_names():
    facts = [("colour", "red", None), ("colour", "red", None), ("colour", "blue", None), ("colour", "cyan", None)]
    facts += [("first", answer, 2) for answer in ("red", "blue", "green", "cyan", "yellow")]
    assert dict(chance(facts)) == {"colour": 0.5, "first": 0.5}
