//! One stream that the provider asked for, from its order to its end.

use std::sync::Arc;

use bytes::Bytes;
use skerry_proto::link::link_client::LinkClient;
use skerry_proto::link::{
    EdgeControl, OpenTunnel, TunnelError, TunnelFailed, TunnelFrame, TunnelOpen, edge_control, tunnel_frame,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::streams::Streams;

/// Frames that may wait in each direction: with the chunk size, what one stream may hold in memory.
const QUEUE: usize = 16;

/// Opens the tunnel and serves its target. Ends with the target, the provider, or the session.
pub(super) async fn serve(
    mut client: LinkClient<Channel>,
    streams: Arc<Streams>,
    session: String,
    order: OpenTunnel,
    to_control: mpsc::Sender<EdgeControl>,
) {
    let Some(target) = order.target else {
        return fail(
            &to_control,
            order.id,
            "this edge daemon does not know such streams; upgrade it",
        )
        .await;
    };
    let (out, frames) = mpsc::channel(QUEUE);
    let open = tunnel_frame::Frame::Open(TunnelOpen {
        session,
        id: order.id.clone(),
    });
    // The queue is new and has room.
    let _ = out.try_send(TunnelFrame { frame: Some(open) });
    let mut inbound = match client.tunnel(ReceiverStream::new(frames)).await {
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
