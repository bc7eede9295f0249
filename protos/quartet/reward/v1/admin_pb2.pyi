from quartet.common.v1 import common_pb2 as _common_pb2
from quartet.reward.v1 import reward_pb2 as _reward_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SwapModelRequest(_message.Message):
    __slots__ = ("model", "revision")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ...) -> None: ...

class SwapModelResponse(_message.Message):
    __slots__ = ("model", "normalisation", "replaced", "load_seconds")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NORMALISATION_FIELD_NUMBER: _ClassVar[int]
    REPLACED_FIELD_NUMBER: _ClassVar[int]
    LOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelInfo
    normalisation: _reward_pb2.Normalisation
    replaced: _common_pb2.ServedBy
    load_seconds: float
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelInfo, _Mapping]] = ..., normalisation: _Optional[_Union[_reward_pb2.Normalisation, _Mapping]] = ..., replaced: _Optional[_Union[_common_pb2.ServedBy, _Mapping]] = ..., load_seconds: _Optional[float] = ...) -> None: ...

class GetDriftRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetDriftResponse(_message.Message):
    __slots__ = ("served_by", "window", "report", "not_compared")
    SERVED_BY_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    NOT_COMPARED_FIELD_NUMBER: _ClassVar[int]
    served_by: _common_pb2.ServedBy
    window: ScoreWindow
    report: DriftReport
    not_compared: str
    def __init__(self, served_by: _Optional[_Union[_common_pb2.ServedBy, _Mapping]] = ..., window: _Optional[_Union[ScoreWindow, _Mapping]] = ..., report: _Optional[_Union[DriftReport, _Mapping]] = ..., not_compared: _Optional[str] = ...) -> None: ...

class ScoreWindow(_message.Message):
    __slots__ = ("score_count", "mean", "std", "truncated_share", "invalid_share")
    SCORE_COUNT_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_SHARE_FIELD_NUMBER: _ClassVar[int]
    INVALID_SHARE_FIELD_NUMBER: _ClassVar[int]
    score_count: int
    mean: float
    std: float
    truncated_share: float
    invalid_share: float
    def __init__(self, score_count: _Optional[int] = ..., mean: _Optional[float] = ..., std: _Optional[float] = ..., truncated_share: _Optional[float] = ..., invalid_share: _Optional[float] = ...) -> None: ...

class DriftReport(_message.Message):
    __slots__ = ("drifted", "alpha", "p_value", "psi", "psi_p_value", "ks", "ks_p_value", "shift_stds", "z", "z_p_value", "score_count", "baseline_count", "compared_unix_ns")
    DRIFTED_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    P_VALUE_FIELD_NUMBER: _ClassVar[int]
    PSI_FIELD_NUMBER: _ClassVar[int]
    PSI_P_VALUE_FIELD_NUMBER: _ClassVar[int]
    KS_FIELD_NUMBER: _ClassVar[int]
    KS_P_VALUE_FIELD_NUMBER: _ClassVar[int]
    SHIFT_STDS_FIELD_NUMBER: _ClassVar[int]
    Z_FIELD_NUMBER: _ClassVar[int]
    Z_P_VALUE_FIELD_NUMBER: _ClassVar[int]
    SCORE_COUNT_FIELD_NUMBER: _ClassVar[int]
    BASELINE_COUNT_FIELD_NUMBER: _ClassVar[int]
    COMPARED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    drifted: bool
    alpha: float
    p_value: float
    psi: float
    psi_p_value: float
    ks: float
    ks_p_value: float
    shift_stds: float
    z: float
    z_p_value: float
    score_count: int
    baseline_count: int
    compared_unix_ns: int
    def __init__(self, drifted: _Optional[bool] = ..., alpha: _Optional[float] = ..., p_value: _Optional[float] = ..., psi: _Optional[float] = ..., psi_p_value: _Optional[float] = ..., ks: _Optional[float] = ..., ks_p_value: _Optional[float] = ..., shift_stds: _Optional[float] = ..., z: _Optional[float] = ..., z_p_value: _Optional[float] = ..., score_count: _Optional[int] = ..., baseline_count: _Optional[int] = ..., compared_unix_ns: _Optional[int] = ...) -> None: ...
