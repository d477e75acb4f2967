"""CLINC150 (Larson et al. 2019): what does somebody want from an assistant? 150 intents, without the out-of-scope rows."""

from __future__ import annotations

from pathlib import Path

from ctxdistill import files
from ctxdistill.readers import Record
from ctxdistill.tasks.source import Hub, Local, Source
from ctxdistill.tasks.task import Pattern, Task

_NAMES = """
accept_reservations account_blocked alarm application_status apr are_you_a_bot balance bill_balance bill_due
book_flight book_hotel calculator calendar calendar_update calories cancel cancel_reservation car_rental card_declined
carry_on change_accent change_ai_name change_language change_speed change_user_name change_volume confirm_reservation
cook_time credit_limit credit_limit_change credit_score current_location damaged_card date definition direct_deposit
directions distance do_you_have_pets exchange_rate expiration_date find_phone flight_status flip_coin food_last
freeze_account fun_fact gas gas_type goodbye greeting how_busy how_old_are_you improve_credit_score income
ingredient_substitution ingredients_list insurance insurance_change interest_rate international_fees international_visa
jump_start last_maintenance lost_luggage make_call maybe meal_suggestion meaning_of_life measurement_conversion
meeting_schedule min_payment mpg new_card next_holiday next_song no nutrition_info oil_change_how oil_change_when order
order_checks order_status pay_bill payday pin_change play_music plug_type pto_balance pto_request pto_request_status
pto_used recipe redeem_rewards reminder reminder_update repeat replacement_card_duration report_fraud report_lost_card
reset_settings restaurant_reservation restaurant_reviews restaurant_suggestion rewards_balance roll_dice rollover_401k
routing schedule_maintenance schedule_meeting share_location shopping_list shopping_list_update smart_home spelling
spending_history sync_device taxes tell_joke text thank_you time timer timezone tire_change tire_pressure todo_list
todo_list_update traffic transactions transfer translate travel_alert travel_notification travel_suggestion uber
update_playlist user_name vaccines w2 weather what_are_your_hobbies what_can_i_ask_you what_is_your_name what_song
where_are_you_from whisper_mode who_do_you_work_for who_made_you yes
"""
LABELS = tuple(_NAMES.split())


def _source(split: str, each: int, oos: int) -> Source:
    counts = dict.fromkeys(LABELS, each)

    def read(path: Path, most: int, problems: list[str]) -> tuple[list[Record], int]:
        """The file is an object: split -> list of [text, intent]; the out-of-scope rows are splits of their own."""
        try:
            pairs = files.read_json(path)[split]
            records = [
                (f"{path.name}:{split}:{i}", {"text": t, "label": label}) for i, (t, label) in enumerate(pairs, 1)
            ]
        except (OSError, ValueError, TypeError, KeyError) as error:
            problems.append(f"expected an object with {split!r}: [[text, intent], ...], found {error!r}")
            return [], 0
        return records[: most or None], len(records)

    return Source(
        name=f"CLINC150 {split}",
        labels=LABELS,
        local=Local(file="clinc150/data_small.json", read=read, counts=counts),
        hub=Hub(
            path="clinc/clinc_oos",
            config="small",
            split=split,
            label="intent",
            counts={**counts, "oos": oos},
        ),
    )


TASK = Task(
    name="clinc150",
    version=1,
    title="CLINC150",
    labels=LABELS,
    train=_source("train", 50, 100),
    evaluation=_source("test", 30, 1000),
    patterns={"default": Pattern("Request: {text}\nIntent:", {label: label.replace("_", " ") for label in LABELS})},
)
