"""What keeps Python from looking for garbage ends as it should."""

import gc

from eagle_train.importing import kept


def test_what_is_kept_for_a_while_may_be_freed_after_it_and_what_was_kept_before_stays():
    before = gc.get_freeze_count()
    gc.unfreeze()
    try:
        with kept():
            assert gc.get_freeze_count() > 0
        assert gc.get_freeze_count() == 0
        gc.freeze()
        with kept():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        if before:
            gc.freeze()
