EXIT_REASONS: dict[int, str]
SUBERRORS: dict[int, str]
SYSTEM_EVENTS: dict[int, str]
VMX_EXIT_REASONS: dict[int, str]
SVM_EXIT_CODES: dict[int, str]
VMX_FAILED_VMENTRY: int

def exit_name(reason: int) -> str: ...
def hardware_exit_name(code: int, vendor: str) -> str: ...
