//! What a gRPC status of the engine means for the caller.

use std::io;
use std::path::Path;

use tonic::{Code, Status};

use crate::runtime::RuntimeError;

/// Why a creation failed: the name is taken, perhaps by a leftover, or something else.
pub(super) enum CreateError {
    /// Something of that name exists; the engine's words.
    NameTaken(String),
    /// Any other failure.
    Other(RuntimeError),
}

impl CreateError {
    /// The failure for the caller, when nothing more can be done about it.
    pub(super) fn into_error(self) -> RuntimeError {
        match self {
            CreateError::NameTaken(message) => RuntimeError::Failed(message),
            CreateError::Other(error) => error,
        }
    }
}

/// What the failure of a call about `object` means.
pub(super) fn error(socket: &Path, scheme: &'static str, object: &str, status: &Status) -> RuntimeError {
    let message = status.message();
    if is_transport_failure(status) {
        return RuntimeError::Unavailable {
            endpoint: socket.display().to_string(),
            message: format!(
                "{}; check that the engine runs and that its CRI plugin listens on this socket",
                deepest_message(status)
            ),
        };
    }
    match status.code() {
        Code::NotFound => RuntimeError::NotFound(object.to_owned()),
        Code::InvalidArgument => RuntimeError::Invalid(format!("{object}: {message}")),
        Code::DeadlineExceeded => RuntimeError::Timeout(object.to_owned()),
        Code::ResourceExhausted => RuntimeError::Busy(format!("{object}: {message}")),
        Code::Unimplemented => RuntimeError::Unsupported {
            runtime: scheme,
            what: format!("{object}: {message}"),
        },
        _ => RuntimeError::Failed(format!("{object}: {message}")),
    }
}

/// The same for a pull: what the engine says is not there or does not answer is the registry's side of it.
pub(super) fn pull_error(socket: &Path, scheme: &'static str, image: &str, status: &Status) -> RuntimeError {
    let answered = std::error::Error::source(status).is_none();
    match status.code() {
        Code::NotFound => RuntimeError::NotFound(format!("image {image}: {}", status.message())),
        Code::Unavailable if answered => RuntimeError::Failed(format!("image {image}: {}", status.message())),
        _ => error(socket, scheme, &format!("image {image}"), status),
    }
}

/// Whether the engine was not reached or the connection broke, as opposed to an answer that it gave.
fn is_transport_failure(status: &Status) -> bool {
    status.code() == Code::Unavailable
        || std::error::Error::source(status).is_some_and(|cause| {
            cause.is::<tonic::transport::Error>() || cause.is::<hyper::Error>() || cause.is::<io::Error>()
        })
}

/// The transport wraps its causes; only the innermost says anything ("No such file or directory").
fn deepest_message(status: &Status) -> String {
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(status);
    let mut message = status.message().to_owned();
    while let Some(error) = cause {
        message = error.to_string();
        cause = error.source();
    }
    message
}

/// Both engines keep the name of a creation under way or left over, and have no code of their own for it.
pub(super) fn is_name_taken(status: &Status) -> bool {
    status.code() == Code::AlreadyExists
        || status.message().contains("is reserved for")
        || status.message().contains("name is reserved")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserved_name_is_known_by_code_or_words() {
        assert!(is_name_taken(&Status::already_exists("x")));
        assert!(is_name_taken(&Status::unknown(
            "failed to reserve sandbox name \"a_b_c_0\": name \"a_b_c_0\" is reserved for \"1234\""
        )));
        assert!(!is_name_taken(&Status::unknown("no space left on device")));
    }

    #[test]
    fn each_status_becomes_the_error_that_says_what_to_do_next() {
        let error = |status| {
            super::error(
                Path::new("/run/engine.sock"),
                "containerd",
                "container abc",
                &status,
            )
        };
        assert!(matches!(error(Status::not_found("")), RuntimeError::NotFound(_)));
        assert!(matches!(
            error(Status::invalid_argument("")),
            RuntimeError::Invalid(_)
        ));
        assert!(matches!(
            error(Status::deadline_exceeded("")),
            RuntimeError::Timeout(_)
        ));
        assert!(matches!(
            error(Status::unimplemented("")),
            RuntimeError::Unsupported { .. }
        ));
        assert!(matches!(
            error(Status::resource_exhausted("")),
            RuntimeError::Busy(_)
        ));
        assert!(matches!(error(Status::unknown("")), RuntimeError::Failed(_)));
        let lost = error(Status::unavailable("connection refused")).to_string();
        assert!(
            lost.contains("/run/engine.sock") && lost.contains("connection refused"),
            "{lost}"
        );
    }

    #[test]
    fn a_registry_that_does_not_answer_is_not_taken_for_the_engine() {
        let socket = Path::new("/run/engine.sock");
        let error = pull_error(
            socket,
            "containerd",
            "a/b:1",
            &Status::unavailable("503 from the registry"),
        );
        assert_eq!(error.to_string(), "image a/b:1: 503 from the registry");
        let lost = Status::from_error(Box::new(io::Error::other("connection reset")));
        let error = pull_error(socket, "containerd", "a/b:1", &lost);
        assert!(matches!(error, RuntimeError::Unavailable { .. }), "{error:?}");
    }
}
