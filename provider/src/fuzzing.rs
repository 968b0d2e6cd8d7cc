//! The decoders of what edges send, as targets for hostile bytes. See [`skerry_proto::fuzzing`].

use prost::Message;
use skerry_proto::fuzzing::Target;
use skerry_proto::link::{JoinRequest, TunnelFrame, tunnel_frame};

use crate::pki;

/// The decoders of the provider.
pub const TARGETS: [Target; 2] = [
    Target {
        name: "join_request",
        run: join_request,
        seeds: || {
            let request = JoinRequest {
                site: "harbour".to_owned(),
                token: "skerry.harbour.abc.def".to_owned(),
                csr_der: pki::sample_request().into(),
            };
            vec![request.encode_to_vec(), pki::sample_request()]
        },
    },
    Target {
        name: "tunnel_frame",
        run: tunnel_frame,
        seeds: || {
            let frame = tunnel_frame::Frame::Data(vec![1, 2, 3].into());
            vec![TunnelFrame { frame: Some(frame) }.encode_to_vec()]
        },
    },
];

/// A request to join: its token and its certificate request.
pub fn join_request(bytes: &[u8]) {
    if let Ok(request) = JoinRequest::decode(bytes) {
        let _ = request.token.parse::<skerry_proto::token::JoinToken>();
        let _ = request.site.parse::<skerry_proto::SiteName>();
        let _ = pki::read_request(&request.csr_der);
    }
    let _ = pki::read_request(bytes);
}

/// A frame of a tunnel, and the head of the answer that it may carry.
pub fn tunnel_frame(bytes: &[u8]) {
    if let Ok(TunnelFrame {
        frame: Some(tunnel_frame::Frame::Ready(ready)),
    }) = TunnelFrame::decode(bytes)
    {
        let _ = crate::kubelet::any_ready(&ready);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bytes_break_a_decoder_of_the_provider() {
        for target in &TARGETS {
            skerry_proto::fuzzing::pound(target, 2_000);
        }
    }
}
