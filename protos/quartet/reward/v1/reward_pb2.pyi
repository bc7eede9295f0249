from quartet.common.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TruncationPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRUNCATION_POLICY_UNSPECIFIED: _ClassVar[TruncationPolicy]
    TRUNCATION_POLICY_REFUSE: _ClassVar[TruncationPolicy]
    TRUNCATION_POLICY_LEFT: _ClassVar[TruncationPolicy]
TRUNCATION_POLICY_UNSPECIFIED: TruncationPolicy
TRUNCATION_POLICY_REFUSE: TruncationPolicy
TRUNCATION_POLICY_LEFT: TruncationPolicy

class ScoreRequest(_message.Message):
    __slots__ = ("items", "tokenizer_fingerprint", "normalise", "truncation")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NORMALISE_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ScoreItem]
    tokenizer_fingerprint: str
    normalise: bool
    truncation: TruncationPolicy
    def __init__(self, items: _Optional[_Iterable[_Union[ScoreItem, _Mapping]]] = ..., tokenizer_fingerprint: _Optional[str] = ..., normalise: _Optional[bool] = ..., truncation: _Optional[_Union[TruncationPolicy, str]] = ...) -> None: ...

class ScoreItem(_message.Message):
    __slots__ = ("prompt", "response_text", "response_token_ids", "response_unfinished")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_TEXT_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_UNFINISHED_FIELD_NUMBER: _ClassVar[int]
    prompt: _common_pb2.Prompt
    response_text: str
    response_token_ids: _common_pb2.TokenIds
    response_unfinished: bool
    def __init__(self, prompt: _Optional[_Union[_common_pb2.Prompt, _Mapping]] = ..., response_text: _Optional[str] = ..., response_token_ids: _Optional[_Union[_common_pb2.TokenIds, _Mapping]] = ..., response_unfinished: _Optional[bool] = ...) -> None: ...

class ScoreResult(_message.Message):
    __slots__ = ("status", "score", "normalised_score", "token_count", "truncated")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    NORMALISED_SCORE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    status: _common_pb2.ItemStatus
    score: float
    normalised_score: float
    token_count: int
    truncated: bool
    def __init__(self, status: _Optional[_Union[_common_pb2.ItemStatus, _Mapping]] = ..., score: _Optional[float] = ..., normalised_score: _Optional[float] = ..., token_count: _Optional[int] = ..., truncated: _Optional[bool] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("results", "served_by", "work")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    SERVED_BY_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[ScoreResult]
    served_by: _common_pb2.ServedBy
    work: _common_pb2.WorkInterval
    def __init__(self, results: _Optional[_Iterable[_Union[ScoreResult, _Mapping]]] = ..., served_by: _Optional[_Union[_common_pb2.ServedBy, _Mapping]] = ..., work: _Optional[_Union[_common_pb2.WorkInterval, _Mapping]] = ...) -> None: ...

class Normalisation(_message.Message):
    __slots__ = ("mean", "std", "count")
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    mean: float
    std: float
    count: int
    def __init__(self, mean: _Optional[float] = ..., std: _Optional[float] = ..., count: _Optional[int] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("model", "normalisation")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NORMALISATION_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelInfo
    normalisation: Normalisation
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelInfo, _Mapping]] = ..., normalisation: _Optional[_Union[Normalisation, _Mapping]] = ...) -> None: ...
