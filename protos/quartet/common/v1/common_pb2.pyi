from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ItemStatusCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ITEM_STATUS_CODE_UNSPECIFIED: _ClassVar[ItemStatusCode]
    ITEM_STATUS_CODE_OK: _ClassVar[ItemStatusCode]
    ITEM_STATUS_CODE_INVALID: _ClassVar[ItemStatusCode]
    ITEM_STATUS_CODE_RETRYABLE: _ClassVar[ItemStatusCode]
ITEM_STATUS_CODE_UNSPECIFIED: ItemStatusCode
ITEM_STATUS_CODE_OK: ItemStatusCode
ITEM_STATUS_CODE_INVALID: ItemStatusCode
ITEM_STATUS_CODE_RETRYABLE: ItemStatusCode

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class ChatMessages(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("text", "token_ids", "messages")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: TokenIds
    messages: ChatMessages
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., messages: _Optional[_Union[ChatMessages, _Mapping]] = ...) -> None: ...

class ItemStatus(_message.Message):
    __slots__ = ("code", "reason")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    code: ItemStatusCode
    reason: str
    def __init__(self, code: _Optional[_Union[ItemStatusCode, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class ServedBy(_message.Message):
    __slots__ = ("model_id", "weights_version", "weights_fingerprint", "tokenizer_fingerprint", "scoring_fingerprint")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SCORING_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    weights_version: int
    weights_fingerprint: str
    tokenizer_fingerprint: str
    scoring_fingerprint: str
    def __init__(self, model_id: _Optional[str] = ..., weights_version: _Optional[int] = ..., weights_fingerprint: _Optional[str] = ..., tokenizer_fingerprint: _Optional[str] = ..., scoring_fingerprint: _Optional[str] = ...) -> None: ...

class WorkInterval(_message.Message):
    __slots__ = ("start_unix_ns", "end_unix_ns")
    START_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    END_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    start_unix_ns: int
    end_unix_ns: int
    def __init__(self, start_unix_ns: _Optional[int] = ..., end_unix_ns: _Optional[int] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("served_by", "engine", "dtype", "max_sequence_tokens", "vocab_size", "eos_token_ids", "deterministic")
    SERVED_BY_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    served_by: ServedBy
    engine: str
    dtype: str
    max_sequence_tokens: int
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    deterministic: bool
    def __init__(self, served_by: _Optional[_Union[ServedBy, _Mapping]] = ..., engine: _Optional[str] = ..., dtype: _Optional[str] = ..., max_sequence_tokens: _Optional[int] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., deterministic: _Optional[bool] = ...) -> None: ...
