//! One stream that the provider asked for, from its order to its end.

use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use skerry_proto::Class;
use skerry_proto::link::link_client::LinkClient;
use skerry_proto::link::open_tunnel::Target;
use skerry_proto::link::{
    EdgeControl, Kind, OpenTunnel, TunnelError, TunnelFailed, TunnelFrame, TunnelOpen, edge_control,
    tunnel_frame,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::uplink::Uplink;
use crate::store::Store;
use crate::streams::Streams;

/// Frames that may wait in each direction: with the chunk size, what one stream may hold in memory.
const QUEUE: usize = 16;

/// What a tunnel needs of its session.
pub(super) struct Cloud {
    pub(super) client: LinkClient<Channel>,
    pub(super) session: String,
    pub(super) to_control: mpsc::Sender<EdgeControl>,
}

/// The class of the pod that a stream is about: best-effort waits while the uplink is saturated.
pub(super) fn class_of(store: &Store, order: &OpenTunnel) -> Class {
    let (namespace, name) = match &order.target {
        Some(Target::Logs(logs)) => (&logs.namespace, &logs.pod),
        Some(Target::Stream(stream)) => (&stream.namespace, &stream.pod),
        Some(Target::Query(_)) | None => return Class::Standard,
    };
    let found = store.find(Kind::Pod, namespace, name).ok().flatten();
    let pod: Option<Pod> = found.and_then(|object| object.decode().ok());
    pod.as_ref().map(crate::pods::class_of).unwrap_or_default()
}

/// Opens the tunnel and serves its target. Ends with the target, the provider, or the session.
pub(super) async fn serve(
    cloud: Cloud,
    streams: Arc<Streams>,
    order: OpenTunnel,
    (uplink, class): (Uplink, Class),
) {
    let Cloud {
        mut client,
        session,
        to_control,
    } = cloud;
    let Some(target) = order.target else {
        return fail(
            &to_control,
            order.id,
            "this edge daemon does not know such streams; upgrade it",
        )
        .await;
    };
    if let Err(reason) = uplink.admits(class) {
        let reason = format!("{reason}: streams of pods that are not critical wait (spec.link of the Site)");
        return fail(&to_control, order.id, &reason).await;
    }
    let (out, frames) = mpsc::channel(QUEUE);
    let open = tunnel_frame::Frame::Open(TunnelOpen {
        session,
        id: order.id.clone(),
    });
    // The queue is new and has room.
    let _ = out.try_send(TunnelFrame { frame: Some(open) });
    let mut inbound = match client.tunnel(held_back(frames, uplink, class)).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => return fail(&to_control, order.id, status.message()).await,
    };
    let (sender, incoming) = mpsc::channel::<Bytes>(QUEUE);
    let feed = async {
        let mut sender = Some(sender);
        while let Ok(Some(frame)) = inbound.message().await {
            if let (Some(tunnel_frame::Frame::Data(data)), Some(open)) = (frame.frame, &sender)
                && open.send(data).await.is_err()
            {
                // The target takes no more; what the client still sends is read and forgotten.
                sender = None;
            }
        }
        // End of the client's direction: the target sees its input end.
    };
    // The target's end is not the tunnel's: dropping the stream would cancel it, and with it the frames that are still
    // on their way. The provider ends it once it has passed them on, or when its user has gone.
    tokio::join!(feed, streams.run(target, incoming, out));
}

/// The frames, each when its class may pass. Those that tell how the stream began are few and always pass.
fn held_back(
    frames: mpsc::Receiver<TunnelFrame>,
    uplink: Uplink,
    class: Class,
) -> impl Stream<Item = TunnelFrame> + Send {
    ReceiverStream::new(frames).then(move |frame| {
        let uplink = uplink.clone();
        async move {
            if matches!(frame.frame, Some(tunnel_frame::Frame::Data(_))) {
                uplink.pass(class).await;
            }
            frame
        }
    })
}

async fn fail(to_control: &mpsc::Sender<EdgeControl>, id: String, message: &str) {
    let error = Some(TunnelError {
        status: 500,
        message: message.to_owned(),
    });
    let failed = edge_control::Message::TunnelFailed(TunnelFailed { id, error });
    // A closed control stream means that the session, and with it the tunnel, is over.
    let _ = to_control
        .send(EdgeControl {
            message: Some(failed),
        })
        .await;
}
