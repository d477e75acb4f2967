"""Banking77 (Casanueva et al. 2020): what does a customer of a bank ask? 77 intents."""

from __future__ import annotations

from ctxdistill.tasks.source import Hub, Local, Source
from ctxdistill.tasks.task import Pattern, Task

_NAMES = """
Refund_not_showing_up activate_my_card age_limit apple_pay_or_google_pay atm_support automatic_top_up
balance_not_updated_after_bank_transfer balance_not_updated_after_cheque_or_cash_deposit beneficiary_not_allowed
cancel_transfer card_about_to_expire card_acceptance card_arrival card_delivery_estimate card_linking card_not_working
card_payment_fee_charged card_payment_not_recognised card_payment_wrong_exchange_rate card_swallowed
cash_withdrawal_charge cash_withdrawal_not_recognised change_pin compromised_card contactless_not_working
country_support declined_card_payment declined_cash_withdrawal declined_transfer direct_debit_payment_not_recognised
disposable_card_limits edit_personal_details exchange_charge exchange_rate exchange_via_app extra_charge_on_statement
failed_transfer fiat_currency_support get_disposable_virtual_card get_physical_card getting_spare_card
getting_virtual_card lost_or_stolen_card lost_or_stolen_phone order_physical_card passcode_forgotten
pending_card_payment pending_cash_withdrawal pending_top_up pending_transfer pin_blocked receiving_money request_refund
reverted_card_payment? supported_cards_and_currencies terminate_account top_up_by_bank_transfer_charge
top_up_by_card_charge top_up_by_cash_or_cheque top_up_failed top_up_limits top_up_reverted topping_up_by_card
transaction_charged_twice transfer_fee_charged transfer_into_account transfer_not_received_by_recipient transfer_timing
unable_to_verify_identity verify_my_identity verify_source_of_funds verify_top_up virtual_card_not_working
visa_or_mastercard why_verify_identity wrong_amount_of_cash_received wrong_exchange_rate_for_cash_withdrawal
"""
LABELS = tuple(_NAMES.split())


def _source(split: str, counts: dict[str, int] | int) -> Source:
    return Source(
        name=f"Banking77 {split}",
        labels=LABELS,
        local=Local(file=f"banking77/{split}.csv", label="category", counts=counts),
        hub=Hub(path="legacy-datasets/banking77", split=split, counts=counts),
    )


TASK = Task(
    name="banking77",
    version=1,
    title="Banking77",
    labels=LABELS,
    train=_source("train", 10_003),  # 35 to 187 of each
    evaluation=_source("test", dict.fromkeys(LABELS, 40)),
    patterns={"default": Pattern("Message: {text}\nIntent:", {label: label.replace("_", " ") for label in LABELS})},
)
