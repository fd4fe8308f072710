"""What answers score, and what guessing would."""

from eagle_train.train.scores import chance, scores


def test_chance_is_the_commonest_answer_or_a_guess_among_those_the_question_names():
    facts = [("colour", "red", None), ("colour", "red", None), ("colour", "blue", None), ("colour", "cyan", None)]
    facts += [("first", answer, 2) for answer in ("red", "blue", "green", "cyan", "yellow")]
    assert dict(chance(facts)) == {"colour": 0.5, "first": 0.5}


def test_a_type_scores_its_mean_and_simple_ones_count_alike_however_many_questions_they_have():
    right = [("count", 1.0), ("colour", 1.0), ("colour", 0.0), ("colour", 0.0), ("colour", 0.0), ("video", 0.0)]
    found = scores(right, ["colour", "count", "absent"], "eval")
    assert found == {"eval/colour": 0.25, "eval/count": 1.0, "eval/video": 0.0, "eval/simple": 0.625}
    assert scores(right, ["absent"], "eval").keys() == {"eval/colour", "eval/count", "eval/video"}
