//! How a handler is run for a message, and what is known of its reply when it returns.

use std::any::Any;
use std::pin::Pin;
use std::task::{Context as Task, Poll};

use actix::dev::MessageResponse;
use actix::fut::ActorFuture;
use actix::{Actor, AsyncContext, Context, Handler, Message, ResponseActFuture, ResponseFuture};
use tokio::sync::oneshot;

use super::Failure;

/// Whether anybody wants to know the reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Watch {
    Reply,
    Nothing,
}

impl Watch {
    /// `Reply`, if somebody waits for it.
    pub(super) fn of(wanted: bool) -> Self {
        match wanted {
            true => Self::Reply,
            false => Self::Nothing,
        }
    }
}

/// A handler that has returned.
pub(crate) enum Running<T> {
    /// Nobody wants to know, and the work that is left is the context's.
    Unwatched,
    /// There is a reply, or there will certainly be none.
    Done(Result<T, Failure>),
    /// The reply comes later. The work goes on even if nobody waits for it.
    Replying(oneshot::Receiver<T>),
    /// The reply comes later; dropping the receiver ends the work.
    ReplyingCancellable(oneshot::Receiver<T>),
    /// The reply is that of this future, which goes on even if nobody waits for it.
    Working(ResponseFuture<T>),
    /// The reply comes later; dropping the future ends the work.
    Cancellable(ResponseFuture<T>),
}

/// Runs the handler of `A` for `M`.
pub(crate) type RunFn<A, M> = fn(&mut A, M, &mut Context<A>, Watch) -> Running<<M as Message>::Result>;

/// A handler of any kind.
pub(super) fn run<A, M>(actor: &mut A, message: M, ctx: &mut Context<A>, watch: Watch) -> Running<M::Result>
where
    A: Actor<Context = Context<A>> + Handler<M>,
    M: Message + 'static,
{
    let reply = match as_future(actor.handle(message, ctx)) {
        Ok(work) => return Running::Working(work),
        Err(reply) => reply,
    };
    match watch {
        Watch::Nothing => {
            reply.handle(ctx, None);
            Running::Unwatched
        }
        Watch::Reply => {
            let (tell, mut replied) = oneshot::channel();
            reply.handle(ctx, Some(tell));
            match replied.try_recv() {
                Ok(value) => Running::Done(Ok(value)),
                Err(oneshot::error::TryRecvError::Closed) => Running::Done(Err(Failure::NoReply)),
                Err(oneshot::error::TryRecvError::Empty) => Running::Replying(replied),
            }
        }
    }
}

/// The reply as the future that it is, if it is one. actix would run it where nobody hears of its panic.
fn as_future<R: 'static, T: 'static>(reply: R) -> Result<ResponseFuture<T>, R> {
    let mut reply = Some(reply);
    let work = (&mut reply as &mut dyn Any).downcast_mut::<Option<ResponseFuture<T>>>();
    match (work.and_then(Option::take), reply) {
        (Some(work), _) => Ok(work),
        (None, Some(reply)) => Err(reply),
        (None, None) => unreachable!("what was not taken is there"),
    }
}

/// A handler whose work is a future that may be dropped.
pub(super) fn run_cancellable<A, M>(
    actor: &mut A,
    message: M,
    ctx: &mut Context<A>,
    watch: Watch,
) -> Running<M::Result>
where
    A: Actor<Context = Context<A>> + Handler<M, Result = ResponseFuture<M::Result>>,
    M: Message,
{
    let work = actor.handle(message, ctx);
    match watch {
        Watch::Nothing => Running::Working(work),
        Watch::Reply => Running::Cancellable(work),
    }
}

/// The same for work that needs the actor.
pub(super) fn run_cancellable_act<A, M>(
    actor: &mut A,
    message: M,
    ctx: &mut Context<A>,
    watch: Watch,
) -> Running<M::Result>
where
    A: Actor<Context = Context<A>> + Handler<M, Result = ResponseActFuture<A, M::Result>>,
    M: Message,
{
    let work = actor.handle(message, ctx);
    match watch {
        Watch::Nothing => {
            MessageResponse::<A, M>::handle(work, ctx, None);
            Running::Unwatched
        }
        Watch::Reply => {
            let (tell, replied) = oneshot::channel();
            ctx.spawn(UntilCancelled { work, tell: Some(tell) });
            Running::ReplyingCancellable(replied)
        }
    }
}

/// Work of an actor that ends when its reply has no receiver any more.
struct UntilCancelled<A: Actor, T> {
    work: ResponseActFuture<A, T>,
    tell: Option<oneshot::Sender<T>>,
}

impl<A: Actor, T> ActorFuture<A> for UntilCancelled<A, T> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, actor: &mut A, ctx: &mut A::Context, task: &mut Task<'_>) -> Poll<()> {
        let this = &mut *self;
        if let Some(tell) = &mut this.tell
            && tell.poll_closed(task).is_ready()
        {
            return Poll::Ready(());
        }
        match this.work.as_mut().poll(actor, ctx, task) {
            Poll::Ready(value) => {
                if let Some(tell) = this.tell.take() {
                    // The asker may have gone in this moment.
                    let _ = tell.send(value);
                }
                Poll::Ready(())
            }
            Poll::Pending => Poll::Pending,
        }
    }
}
